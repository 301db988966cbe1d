"""What is measured of an engine: times, memory, operations, scalars. Nothing of it changes training."""
