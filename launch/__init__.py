"""Starting ranks on a cluster: Hydra config in, processes out. Imports no torch in the launcher itself."""
