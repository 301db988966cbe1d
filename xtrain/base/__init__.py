"""What everything stands on: errors, log, files, run folder. Imports no torch."""
