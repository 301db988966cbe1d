"""Runs that something is done to at a random moment; each has to end by itself with the undisturbed curve."""
