"""`xtrain doctor`: what this machine has, what it lacks and why, and whether its collectives give the right numbers.

The command itself (main.py) imports no torch: chips and libraries are touched by processes that it starts and watches,
so that one that hangs or dies is a sentence in the report. docs/doctor.md describes the report.
"""
