"""The arithmetic of apex's kernels; `amp_C` gathers them."""
