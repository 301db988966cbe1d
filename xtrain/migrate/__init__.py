"""`xtrain migrate`: what a repository uses of DeepSpeed, CUDA and apex, and what becomes of it under xtrain."""
