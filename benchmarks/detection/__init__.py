"""What `xtrain align` finds, and what it leaves alone: injected defects and harmless differences, counted.

    python -m benchmarks.detection            # or: make detection

Trains glm_tiny many times, judges every run by the envelope of perturbed runs and by the common "2 % mean relative
error", and writes both tables into docs/alignment.md. Runs are kept in runs/detection, and made again only when they
are not there.
"""
