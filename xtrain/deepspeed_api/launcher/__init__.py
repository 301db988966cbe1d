"""DeepSpeed's `deepspeed.launcher`: the command's functions. xtrain.launch does the work; nothing imports torch."""
