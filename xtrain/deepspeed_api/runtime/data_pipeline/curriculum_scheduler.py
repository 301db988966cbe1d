"""`deepspeed.runtime.data_pipeline.curriculum_scheduler`."""

from xtrain.data.curriculum import CurriculumScheduler

__all__ = ["CurriculumScheduler"]
