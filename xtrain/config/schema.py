"""The DeepSpeed configuration as pydantic models: the reference of what xtrain reads.

Key names, defaults and units are DeepSpeed's (https://www.deepspeed.ai/docs/config-json/). A field
without a mark is implemented; `NotYet` and `NoEffect` (see rules.py) say what happens to the others. The text below a
field says what the key does: docs/config.md is made of it. Longer sections have modules of their own beside this one.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from xtrain.config.compilation import CompileConfig
from xtrain.config.metrics import (
    CometConfig,
    CommsLoggerConfig,
    CsvConfig,
    FlopsProfilerConfig,
    TensorBoardConfig,
    TimersConfig,
    WandbConfig,
)
from xtrain.config.own import RecordConfig, XtrainSection
from xtrain.config.precision import (
    Bf16Config,
    DataTypesConfig,
    DtypeName,
    Fp16Config,
    TorchAutocastConfig,
)
from xtrain.config.rules import FeatureDict, NoEffect, NotYet, OnlyNative, Section
from xtrain.config.zero import ONE_BUFFER, OffloadConfig, ZeroConfig

__all__ = [
    "ActivationCheckpointingConfig",
    "Bf16Config",
    "CheckpointConfig",
    "CompileConfig",
    "Config",
    "DataTypesConfig",
    "Fp16Config",
    "OffloadConfig",
    "OptimizerConfig",
    "RecordConfig",
    "SchedulerConfig",
    "TorchAutocastConfig",
    "XtrainSection",
    "ZeroConfig",
]

Count = Annotated[int, Field(lt=2**63)]
"""A number of samples or steps, which tensors' 64-bit integers must be able to hold."""


_DEEPSPEED_OPTIMIZERS = ("adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "musgd", "muon")


class OptimizerConfig(Section):
    """The optimizer that the engine builds, unless the script passes one to initialize()."""

    type: str
    """Adam, AdamW, Adagrad, Lamb, Lion, Muon, SGD (in any case), or the name of a class of torch.optim. Adam means
    AdamW unless `params` has `"adam_w_mode": false`."""
    params: dict[str, Any] = {}
    """Arguments of its constructor, such as `lr`, `betas`, `eps`, `weight_decay`. `"torch_adam": true` takes PyTorch's
    Adam or AdamW instead of xtrain's."""
    legacy_fusion: Annotated[bool, NotYet("leave it out")] = False
    """In DeepSpeed: an older way to apply fused Adam in fp16."""

    @property
    def reported_type(self) -> str:
        """The type as DeepSpeed reports it: its own optimizers in lower case, others as they were written."""
        return self.type.lower() if self.type.lower() in _DEEPSPEED_OPTIMIZERS else self.type


class SchedulerConfig(Section):
    """The learning-rate schedule, which advances with each update that is applied. A script may pass its own."""

    type: str
    """WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle or LRRangeTest."""
    params: dict[str, Any] = {}
    """Arguments of its constructor, such as `warmup_num_steps` and `total_num_steps`, in optimizer steps."""


class CheckpointConfig(Section):
    """How checkpoints are written."""

    ignores_unknown: ClassVar[bool] = True
    tag_validation: Literal["Ignore", "Warn", "Fail"] = "Warn"
    """What to do when ranks pass different tags to save_checkpoint: take rank 0's, do so with a warning, or raise."""
    load_universal: Annotated[
        bool, NoEffect("every checkpoint loads into any number of ranks without conversion")
    ] = False
    """In DeepSpeed: load a checkpoint that its tool has converted to the universal format."""
    use_node_local_storage: Annotated[bool, NotYet("save to a file system that all nodes share")] = False
    """In DeepSpeed: each node writes to a disk of its own."""
    parallel_write: Annotated[FeatureDict | None, NoEffect("every rank writes its own part already")] = None
    """In DeepSpeed: `pipeline_stage` lets the data-parallel ranks of a stage share the writing of its layers."""
    writer: Annotated[FeatureDict | None, NotYet("leave it out: files are written by each rank")] = None
    """In DeepSpeed: a faster writer of files, and which ranks use it."""
    checkpoint_serialization: Annotated[
        bool, NoEffect("it is a choice between two formats of torch.save, and neither is used")
    ] = True
    """In DeepSpeed: the format of torch.save, new (true) or old."""
    format: Annotated[
        Literal["xtrain", "deepspeed"],
        NotYet("checkpoints are written in xtrain's own format"),
        OnlyNative(fine=("deepspeed",)),
    ] = "xtrain"
    """Format of the checkpoints that are written."""

    @field_validator("tag_validation", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.capitalize() if isinstance(value, str) else value


class ActivationCheckpointingConfig(Section):
    """How xtrain.checkpointing keeps the inputs of checkpointed functions until backward. A script's call of
    checkpointing.configure() wins."""

    ignores_unknown: ClassVar[bool] = True
    partition_activations: bool = False
    """Keep a piece of each input on each model-parallel rank of the mpu, and gather it for backward."""
    cpu_checkpointing: bool = False
    """Move the inputs to host memory until backward."""
    contiguous_memory_optimization: bool = False
    """Copy the pieces into blocks that are allocated once, so that memory does not fragment. Needs
    partition_activations and number_checkpoints."""
    number_checkpoints: int | None = Field(None, gt=0)
    """Calls of checkpoint() in one forward pass; how many pieces a block has room for."""
    synchronize_checkpoint_boundary: bool = False
    """Wait for the device before and after each checkpointed function."""
    profile: bool = False
    """Log the time of each checkpointed forward pass and recomputation."""


def _feature(instead: str) -> NotYet:
    """A feature that is off unless its section says `"enabled": true`."""
    return NotYet(instead, "enabled")


class Config(Section):
    """The whole configuration."""

    ignores_unknown: ClassVar[bool] = True

    # Two of the next three suffice: train_batch_size = micro-batch x accumulation steps x data-parallel ranks.
    train_batch_size: Count | None = None
    """Samples in one optimizer step, over all ranks. It is the product of the next two keys and the number of
    data-parallel ranks; what is left out is computed from the others."""
    train_micro_batch_size_per_gpu: Count | None = None
    """Samples in one forward and backward pass of one rank."""
    gradient_accumulation_steps: Count | None = None
    """Micro-batches whose gradients are averaged for one optimizer step. Left out: what the batch sizes give, else
    1."""
    optimizer: OptimizerConfig | None = None
    """Left out: initialize() must be given one, or the engine only evaluates."""
    scheduler: SchedulerConfig | None = None
    """Left out: the learning rate changes only if the script changes it."""
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest 2-norm of the gradients of all parameters together: larger ones are scaled down to it. 0: no clipping.
    The default is DeepSpeed's."""
    zero_optimization: ZeroConfig = ZeroConfig()
    """`true` alone means stage 1."""
    bf16: Bf16Config = Bf16Config()
    """`bfloat16` is an old name of the section."""
    fp16: Fp16Config = Fp16Config()
    """At most one of fp16 and bf16 may be enabled."""
    torch_autocast: TorchAutocastConfig = TorchAutocastConfig()
    data_types: DataTypesConfig = DataTypesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    compile: CompileConfig = CompileConfig()
    xtrain: XtrainSection = XtrainSection()
    zero_allow_untested_optimizer: bool = False
    """Accept, with a warning, an optimizer that is not known to update each element on its own. ZeRO stages 1 to 3
    refuse it otherwise, because they hand it slices of parameters."""
    communication_data_type: DtypeName | None = None
    """Dtype in which gradients travel. Left out: the one in which they are accumulated."""
    seq_parallel_communication_data_type: DtypeName | None = None
    """The same where the mpu divides sequences over ranks. Left out: fp32, as in DeepSpeed."""
    prescale_gradients: bool = False
    """Divide gradients by the number of data-parallel ranks before they are summed over ranks, instead of after it."""
    gradient_predivide_factor: float = Field(1.0, gt=0)
    """Divide gradients by this number before the sum over ranks, and by (data-parallel ranks / this number) after it:
    the mean is the same, but sums of fp16 over many ranks do not overflow. Has no effect with prescale_gradients or
    with sums."""
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    """Whether gradients are averaged over the data-parallel ranks or summed; a sum is not divided, whatever
    prescale_gradients and gradient_predivide_factor say. "sum" is not for stage 3."""
    managed_gradient_accumulation: bool = True
    """True: every gradient_accumulation_steps-th step() is an update. False: every step() is one, however many
    backwards ran before it."""
    disable_python_gc: bool = False
    """Switch Python's automatic garbage collection off while the engine exists; engine.collect_python_gc() collects."""
    steps_per_print: int | None = Field(None, ge=0)
    """Optimizer steps between two lines of progress with samples per second. 0, infinity or left out: none."""
    wall_clock_breakdown: bool = False
    """Time forward, backward, reduction and step in milliseconds, print them on rank 0 (docs/metrics.md). The
    device is waited for before each reading."""
    memory_breakdown: bool = False
    """Print the memory in use before and after forward, backward and step on rank 0."""
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    wandb: WandbConfig = WandbConfig()
    csv_monitor: CsvConfig = CsvConfig()
    comet: CometConfig = CometConfig()
    timers: TimersConfig = TimersConfig()
    flops_profiler: FlopsProfilerConfig = FlopsProfilerConfig()
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    dump_state: bool = False
    """Print the whole checked configuration on rank 0 at initialisation."""
    dataloader_drop_last: bool = False
    """Leave out the last batch of an epoch where it is not full, in the loader that initialize() returns. False: it may
    be smaller, and a few samples may come twice so that all ranks get equally many."""
    log_level: str | None = None
    """Least severe messages that xtrain prints: debug, info, warning, error or critical. Left out: XTRAIN_LOG_LEVEL,
    else info."""

    # Not there yet.
    sparse_gradients: Annotated[bool, NotYet("use dense embedding gradients")] = False
    """In DeepSpeed: exchange only the rows of an embedding's gradient that are not zero."""
    amp: Annotated[FeatureDict | None, _feature('use "bf16": {"enabled": true}')] = None
    """In DeepSpeed: mixed precision by NVIDIA's Apex."""
    tensor_parallel: Annotated[
        FeatureDict | None,
        NotYet("pass an mpu, with tensor-parallel layers of your own", "autotp_size", (None, False, 0, 1)),
    ] = None
    """In DeepSpeed: divide the layers of known models over `autotp_size` ranks (AutoTP)."""
    expert_parallel: Annotated[FeatureDict | None, _feature("use data parallelism")] = None
    """In DeepSpeed: find the experts of known models and divide them over ranks (AutoEP)."""
    sequence_parallel_size: Annotated[
        int, NotYet("pass mpu=xtrain.parallel.ProcessGrid(sequence=...) to initialize()")
    ] = 1
    """In DeepSpeed: ranks over which each sequence is divided."""
    data_parallel_size: Annotated[
        int | None, NotYet("leave it out: it is the number of ranks, or what mpu says")
    ] = None
    """In DeepSpeed: data-parallel ranks, beside sequence_parallel_size."""
    use_data_before_expert_parallelism: Annotated[bool, NotYet("use data parallelism")] = False
    """In DeepSpeed: neighbouring ranks hold the same experts, instead of different ones."""
    elasticity: Annotated[FeatureDict | None, _feature("set train_batch_size")] = None
    """In DeepSpeed: choose a batch size that suits several numbers of ranks."""
    autotuning: Annotated[FeatureDict | None, _feature("set the batch size by hand")] = None
    """In DeepSpeed: try ZeRO stages and batch sizes, and take the fastest."""
    compression_training: Annotated[FeatureDict | None, NotYet("leave it out")] = None
    """In DeepSpeed: quantize or prune the model while it trains."""
    data_efficiency: Annotated[FeatureDict | None, _feature("sample in the script")] = None
    """In DeepSpeed: curriculum learning by data samples, and random dropping of tokens."""
    curriculum_learning: Annotated[FeatureDict | None, _feature("sample in the script")] = None
    """In DeepSpeed: an older curriculum, which lengthens the sequences while training."""
    progressive_layer_drop: Annotated[FeatureDict | None, _feature("drop layers in the model")] = None
    """In DeepSpeed: tell the model with which probability to keep a layer, falling with the steps."""
    eigenvalue: Annotated[FeatureDict | None, _feature("leave it out")] = None
    """In DeepSpeed: the largest eigenvalue of each layer's Hessian, which guides quantization."""
    quantize_training: Annotated[FeatureDict | None, _feature("leave it out")] = None
    """In DeepSpeed: train with fewer and fewer bits a weight (MoQ)."""
    weight_quantization: Annotated[
        FeatureDict | None, NotYet("leave it out", "quantized_initialization", (None, False, {}))
    ] = None
    """In DeepSpeed: `quantized_initialization` keeps the model's weights in 4 or 8 bits."""
    sparse_attention: Annotated[FeatureDict | None, NotYet("choose the attention in the model")] = None
    """In DeepSpeed: the pattern of its block-sparse attention."""
    hybrid_engine: Annotated[FeatureDict | None, _feature("leave it out")] = None
    """In DeepSpeed: one engine that trains and generates, for reinforcement learning."""
    nebula: Annotated[FeatureDict | None, _feature("use save_checkpoint, which writes atomically")] = None
    """In DeepSpeed: checkpoints in the background by Azure's Nebula."""
    datastates_ckpt: Annotated[FeatureDict | None, NotYet("use save_checkpoint")] = None
    """In DeepSpeed: checkpoints in the background by DataStates."""

    graph_harvesting: Annotated[bool, NotYet("leave it out")] = False
    """In DeepSpeed: capture short kernels of the bf16 optimizer in a CUDA graph."""

    # Accepted, without effect.
    pipeline: Annotated[
        FeatureDict | None, NoEffect("it is only read for a PipelineModule, which is not there yet")
    ] = None
    """In DeepSpeed: settings of its pipeline engine."""
    vocabulary_size: Annotated[int | None, NoEffect("DeepSpeed, too, only looks whether 8 divides it")] = None
    """In DeepSpeed: a warning if 8 does not divide it."""
    disable_allgather: Annotated[bool, ONE_BUFFER] = False
    """In DeepSpeed: an old key; collect updated parameters by broadcasts."""
    zero_force_ds_cpu_optimizer: bool = True
    """Written out as true: of the optimizers that a script makes itself, accept only xtrain's own for offloaded states.
    Left out or false: any, since all work on them."""
    aio: Annotated[FeatureDict | None, NoEffect("files are mapped into memory")] = None
    """In DeepSpeed: block size, queue depth and threads of its library for files."""

    @field_validator("gradient_allreduce_op", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("steps_per_print", mode="before")
    @classmethod
    def _never(cls, value: Any) -> Any:
        """Accelerate writes infinity for "never"."""
        return None if value == math.inf else value

    @field_validator("optimizer", "scheduler", mode="before")
    @classmethod
    def _none_without_a_type(cls, value: Any) -> Any:
        """A section that names no type and no options asks for nothing, as in DeepSpeed."""
        empty = isinstance(value, dict) and not (value.keys() - {"type", "params"})
        return None if empty and value.get("type") is None and not value.get("params") else value

    @field_validator("bf16", mode="before")
    @classmethod
    def _null_is_off(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("zero_optimization", mode="before")
    @classmethod
    def _stage_from_bool(cls, value: Any) -> Any:
        """The old spelling `"zero_optimization": true` means stage 1."""
        return {"stage": int(value)} if isinstance(value, bool) else value
