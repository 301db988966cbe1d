"""ZeRO: state (flat), schedule (reducer) and update (optimizer) of partitioned training states."""
