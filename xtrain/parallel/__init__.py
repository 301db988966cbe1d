"""Process grids: which ranks share which work."""

from xtrain.parallel.grid import DataParallelGrid, grid_from_mpu

__all__ = ["DataParallelGrid", "grid_from_mpu"]
