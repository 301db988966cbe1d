"""Process grids: what a script's `mpu` says (grid.py), and one for scripts that have none (mesh.py)."""

from xtrain.parallel.grid import DataParallelGrid, ModelParallel, grid_from_mpu, model_from_mpu
from xtrain.parallel.mesh import ProcessGrid

__all__ = ["DataParallelGrid", "ModelParallel", "ProcessGrid", "grid_from_mpu", "model_from_mpu"]
