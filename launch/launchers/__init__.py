"""How the agents of a run, or its ranks, are started: one module for each kind of cluster."""
