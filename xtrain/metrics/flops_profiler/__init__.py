"""What a forward pass costs, module by module."""
