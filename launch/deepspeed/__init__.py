"""The deepspeed command and its companions: DeepSpeed's options and conventions, on xtrain's agents."""
