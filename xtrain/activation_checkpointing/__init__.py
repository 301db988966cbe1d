"""Activations that are computed again in backward, and the random states that this needs."""
