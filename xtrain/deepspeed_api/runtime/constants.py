"""`deepspeed.runtime.constants`: the configuration's keys, and their defaults, for tools that read a config themselves.

Keys of features that are not there are refused (xtrain/base/missing.py).
"""

from typing import Any

from xtrain.config.schema import Config

ROUTE_TRAIN, ROUTE_EVAL, ROUTE_PREDICT, ROUTE_ENCODE = "train", "eval", "predict", "encode"

TRAIN_BATCH_SIZE = "train_batch_size"
TRAIN_MICRO_BATCH_SIZE_PER_GPU = "train_micro_batch_size_per_gpu"
GRADIENT_ACCUMULATION_STEPS = "gradient_accumulation_steps"
MANAGED_GRADIENT_ACCUMULATION = "managed_gradient_accumulation"

OPTIMIZER, SCHEDULER = "optimizer", "scheduler"
OPTIMIZER_PARAMS = SCHEDULER_PARAMS = "params"
TYPE = "type"
LEGACY_FUSION = "legacy_fusion"
MAX_GRAD_NORM = "max_grad_norm"
ZERO_ALLOW_UNTESTED_OPTIMIZER = "zero_allow_untested_optimizer"
ZERO_FORCE_DS_CPU_OPTIMIZER = "zero_force_ds_cpu_optimizer"

BFLOAT16, BFLOAT16_OLD, FP16 = "bf16", "bfloat16", "fp16"
BFLOAT16_ENABLED = FP16_ENABLED = TORCH_AUTOCAST_ENABLED = "enabled"
CHECK_OVERFLOW = "check_overflow"
BFLOAT16_IMMEDIATE_GRAD_UPDATE = "immediate_grad_update"
BFLOAT16_MASTER_WEIGHTS_AND_GRADS = "bf16_master_weights_and_grads"
BFLOAT16_OPTIMIZER_STATES = "bf16_optimizer_states"
FP16_LOSS_SCALE = "loss_scale"
FP16_AUTO_CAST = "auto_cast"
FP16_INITIAL_SCALE_POWER = "initial_scale_power"
FP16_LOSS_SCALE_WINDOW = "loss_scale_window"
FP16_HYSTERESIS = "hysteresis"
FP16_CONSECUTIVE_HYSTERESIS = "consecutive_hysteresis"
FP16_MIN_LOSS_SCALE = "min_loss_scale"
FP16_MASTER_WEIGHTS_AND_GRADS = "fp16_master_weights_and_grads"
TORCH_AUTOCAST = "torch_autocast"
TORCH_AUTOCAST_DTYPE = "dtype"
TORCH_AUTOCAST_LOWER_PRECISION_SAFE_MODULES = "lower_precision_safe_modules"

GRADIENT_CLIPPING = "gradient_clipping"
PRESCALE_GRADIENTS = "prescale_gradients"
GRADIENT_PREDIVIDE_FACTOR = "gradient_predivide_factor"
GRADIENT_ALLREDUCE_OP = "gradient_allreduce_op"
GRADIENT_ALLREDUCE_OP_MEAN, GRADIENT_ALLREDUCE_OP_SUM = "mean", "sum"
GRADIENT_ALLREDUCE_OP_SUPPORTED = (GRADIENT_ALLREDUCE_OP_MEAN, GRADIENT_ALLREDUCE_OP_SUM)
COMMUNICATION_DATA_TYPE = "communication_data_type"
SEQ_PARALLEL_COMMUNICATION_DATA_TYPE = "seq_parallel_communication_data_type"
DISABLE_ALLGATHER = "disable_allgather"

STEPS_PER_PRINT = "steps_per_print"
DUMP_STATE = "dump_state"
DISABLE_PYTHON_GC = "disable_python_gc"
VOCABULARY_SIZE = "vocabulary_size"
WALL_CLOCK_BREAKDOWN = "wall_clock_breakdown"
MEMORY_BREAKDOWN = "memory_breakdown"
DATALOADER_DROP_LAST = "dataloader_drop_last"
LOG_LEVEL = "log_level"

CHECKPOINT = "checkpoint"
CHECKPOINT_TAG_VALIDATION = "tag_validation"
CHECKPOINT_TAG_VALIDATION_MODES = ["WARN", "IGNORE", "FAIL"]
LOAD_UNIVERSAL_CHECKPOINT = "load_universal"
USE_NODE_LOCAL_STORAGE_CHECKPOINT = "use_node_local_storage"
CHECKPOINT_PARALLEL_WRITE = "parallel_write"
CHECKPOINT_PARALLEL_WRITE_PIPELINE_STAGE = "pipeline_stage"

DATA_TYPES = "data_types"
GRAD_ACCUM_DTYPE = "grad_accum_dtype"
PARAM_DTYPE = "param_dtype"
BUFFER_DTYPE = "buffer_dtype"

DATA_PARALLEL_GROUP = "data_parallel_group"
GLOBAL_RANK = "global_rank"

_SECTIONS = {
    "BFLOAT16": "bf16",
    "FP16": "fp16",
    "TORCH_AUTOCAST": "torch_autocast",
    "CHECKPOINT": "checkpoint",
    "GRAD_ACCUM_DTYPE": "data_types",
    "PARAM_DTYPE": "data_types",
    "BUFFER_DTYPE": "data_types",
}
"""Which section a key stands in, by the start of its constant's name."""


def _defaults() -> dict[str, Any]:
    """`NAME_DEFAULT` for each constant above that is a key: what xtrain's own config has for it."""
    found = {}
    for name, key in dict(globals()).items():
        if not name.isupper() or not isinstance(key, str) or key in _SECTIONS.values():
            continue
        section = next((path for start, path in _SECTIONS.items() if name.startswith(start)), "")
        fields: Any = Config.model_fields
        if section:
            fields = type(fields[section].get_default(call_default_factory=True)).model_fields
        if key in fields:
            found[f"{name}_DEFAULT"] = fields[key].get_default(call_default_factory=True)
    return found


globals().update(_defaults())
