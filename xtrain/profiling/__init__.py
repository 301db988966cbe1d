"""Profilers, under DeepSpeed's import paths."""
