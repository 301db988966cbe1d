"""Stand-ins for what scripts take for granted: CUDA's names in torch, apex. Importing xtrain activates none of them."""
