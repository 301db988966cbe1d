"""What makes bits equal on every device: counter-based random numbers, and perturbations of known size."""
