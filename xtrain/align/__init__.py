"""Recording runs and comparing their curves."""
