"""xtrain through the libraries that import DeepSpeed themselves: released packages, tiny models, no downloads."""
