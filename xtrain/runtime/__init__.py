"""Import paths of `deepspeed.runtime` that scripts use; what they name lives elsewhere in xtrain."""
