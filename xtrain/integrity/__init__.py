"""Silent data corruption: checks, checksums, recomputation; and the injection of faults."""
