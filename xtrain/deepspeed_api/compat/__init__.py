"""What xtrain says about DeepSpeed's names that it does not have. Imports no torch."""
