"""The DeepSpeed configuration as pydantic models: the reference of what xtrain reads.

Key names, defaults and units are DeepSpeed's (https://www.deepspeed.ai/docs/config-json/). A field
without a mark is implemented; `NotYet` and `NoEffect` (see rules.py) say what happens to the others.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from xtrain.config.fake import FakeConfig, SdcCheckConfig
from xtrain.config.instruments import (
    CometConfig,
    CommsLoggerConfig,
    CsvConfig,
    FlopsProfilerConfig,
    TensorBoardConfig,
    TimersConfig,
    WandbConfig,
)
from xtrain.config.precision import (
    Bf16Config,
    DataTypesConfig,
    DtypeName,
    Fp16Config,
    TorchAutocastConfig,
)
from xtrain.config.rules import NoEffect, NotYet, OnlyInStage3, OnlyNative, Section

# A section of a feature that is not there yet: only looked at for whether it asks for something.
FeatureDict = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is False else value)]

Count = Annotated[int, Field(lt=2**63)]
"""A number of samples or steps, which tensors' 64-bit integers must be able to hold."""


_WHOLE_GROUPS = NoEffect("stage 3 gathers module groups, each with one all-gather, and frees them after use")
_ONE_BUFFER = NoEffect("xtrain always reduces and gathers whole buckets of one flat buffer")
_NO_QUANTIZED = NotYet("leave it out: communication uses the gradients' own dtype")


_MAPPED = NoEffect("files are mapped into memory, and the operating system reads and writes them")


class OffloadConfig(Section):
    """`zero_optimization.offload_optimizer`, `zero_optimization.offload_param`: states in host memory or on disk."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    """Folder on a local disk, for device "nvme"."""
    pin_memory: bool = True
    buffer_count: Annotated[int | None, _MAPPED] = Field(None, ge=0)
    buffer_size: Annotated[int | None, _MAPPED] = Field(None, ge=0)
    max_in_cpu: Annotated[int | None, _MAPPED] = Field(None, ge=0)
    pipeline_read: Annotated[bool, _MAPPED] = False
    pipeline_write: Annotated[bool, _MAPPED] = False
    fast_init: Annotated[bool, _MAPPED] = False
    ratio: Annotated[float, NotYet("states are offloaded all or none: leave it out")] = Field(1.0, ge=0, le=1)
    super_offload: Annotated[bool, NotYet('use "device": "cpu" alone')] = False
    cpuadam_cores_perc: Annotated[float, NoEffect("it is only read with super_offload")] = 0.8

    @property
    def pipeline(self) -> bool:
        """Whether pipelined reads or writes were asked for."""
        return self.pipeline_read or self.pipeline_write


class ZeroConfig(Section):
    """`zero_optimization`. Sizes are in elements."""

    stage: int = Field(0, ge=0, le=3)
    reduce_bucket_size: int | None = Field(None, gt=0)
    """None: the backend's default (DeepSpeed: 5e8, one bucket for most models)."""
    overlap_comm: bool | None = None
    """Reduce a bucket as soon as its last gradient has arrived. None: the backend's default."""
    ignore_unused_parameters: bool = True
    """False: an error on every rank when a parameter received no gradient in a step on any rank."""
    compute_grad_norm: bool = True
    """False: do not compute the norm (stages 1 and 2, with gradient_clipping 0); it is then reported as None."""

    contiguous_gradients: Annotated[bool, _ONE_BUFFER] = True
    reduce_scatter: Annotated[bool, _ONE_BUFFER] = True
    use_multi_rank_bucket_allreduce: Annotated[bool, _ONE_BUFFER] = True
    allgather_partitions: Annotated[bool, _ONE_BUFFER] = True
    allgather_bucket_size: Annotated[int, _ONE_BUFFER] = Field(500_000_000, ge=0)
    round_robin_gradients: Annotated[bool, _ONE_BUFFER] = False
    parameter_alignment: Annotated[
        bool, NoEffect("every parameter is aligned in its flat buffer already")
    ] = False
    elastic_checkpoint: Annotated[bool, NoEffect("every checkpoint loads into any number of ranks")] = False
    legacy_stage1: Annotated[bool, NoEffect("there is one implementation of stage 1")] = False

    load_from_fp32_weights: bool = True
    """What load_checkpoint restores master weights from: the checkpoint's, in fp32, or, with false and ZeRO stage 1 or
    higher, its 16-bit weights."""
    offload_param: Annotated[OffloadConfig | None, OnlyInStage3()] = None
    """Where this rank's slices of the parameters live (stage 3)."""
    offload_optimizer: OffloadConfig | None = None
    """Where master weights and optimizer states live (stages 1 to 3); the update is computed there."""
    cpu_offload: bool | None = None
    """Old spelling of offload_optimizer with device cpu."""
    cpu_offload_param: bool | None = None
    """Old spelling of offload_param with device cpu."""
    cpu_offload_use_pin_memory: bool | None = None
    """Old spelling of pin_memory in both."""
    zenflow: Annotated[FeatureDict | None, NotYet("use offload_optimizer alone")] = None
    zero_quantized_weights: Annotated[bool, _NO_QUANTIZED, OnlyInStage3()] = False
    zero_quantized_nontrainable_weights: Annotated[bool, _NO_QUANTIZED, OnlyInStage3()] = False
    zero_quantized_gradients: Annotated[bool, _NO_QUANTIZED, OnlyInStage3()] = False

    prefetch_bucket_size: Annotated[int, OnlyInStage3()] = Field(
        50_000_000, ge=0, alias="stage3_prefetch_bucket_size"
    )
    """Elements gathered ahead of use; 0: none. Left out: the next module group, whatever its size."""
    param_persistence_threshold: Annotated[int, OnlyInStage3()] = Field(
        100_000, ge=0, alias="stage3_param_persistence_threshold"
    )
    """Parameters of at most so many elements stay whole on every rank."""
    model_persistence_threshold: Annotated[int, OnlyInStage3()] = Field(
        2**63 - 1, ge=0, alias="stage3_model_persistence_threshold"
    )
    """At most so many elements in all stay whole for being small."""
    max_live_parameters: Annotated[int, OnlyInStage3()] = Field(
        1_000_000_000, ge=0, alias="stage3_max_live_parameters"
    )
    """A module group is kept for its next use only while no more elements than this are whole."""
    max_reuse_distance: Annotated[int, OnlyInStage3()] = Field(
        1_000_000_000, ge=0, alias="stage3_max_reuse_distance"
    )
    """A module group is kept if no more elements than this are used before it is used again. Left out:
    every group is freed after use."""
    gather_16bit_weights_on_model_save: Annotated[bool, OnlyInStage3()] = Field(
        False, alias="stage3_gather_16bit_weights_on_model_save"
    )
    """Let save_16bit_model make the weights whole on rank 0."""
    sub_group_size: Annotated[int, NoEffect("the optimizer works bucket by bucket")] = Field(
        1_000_000_000, ge=0
    )
    module_granularity_threshold: Annotated[
        int, NoEffect("the blocks of a model are gathered as one; utils.set_z3_leaf_modules marks others")
    ] = Field(0, alias="stage3_module_granularity_threshold")
    use_all_reduce_for_fetch_params: Annotated[bool, _WHOLE_GROUPS] = Field(
        False, alias="stage3_use_all_reduce_for_fetch_params"
    )
    allgather_sequential: Annotated[bool, _WHOLE_GROUPS] = Field(False, alias="stage3_allgather_sequential")
    memory_efficient_linear: Annotated[
        bool,
        NoEffect("what backward needs of a parameter is freed and gathered again with it, in every layer"),
    ] = True
    pipeline_loading_checkpoint: Annotated[bool, NoEffect("every rank reads its own part")] = False
    override_module_apply: Annotated[
        bool, NoEffect("inside zero.Init, Module.apply always makes a module's parameters whole")
    ] = True
    log_trace_cache_warnings: Annotated[
        bool, NoEffect("an iteration that differs from the last one is gathered without prefetching")
    ] = False
    enable_sanity_checks: Annotated[bool, NoEffect("its checks are always on")] = False
    save_muon_momentum_buffer_in_memory: Annotated[bool, NoEffect("optimizer states are kept in memory")] = (
        False
    )
    mics_shard_size: Annotated[
        int, NotYet("leave it out: parameters are divided over all data-parallel ranks"), OnlyInStage3()
    ] = -1
    mics_hierarchical_params_gather: Annotated[bool, NotYet("leave it out")] = False
    zeropp_loco_param: Annotated[FeatureDict | None, _NO_QUANTIZED] = None
    zero_hpz_partition_size: Annotated[
        int, NotYet("leave it out: parameters are divided over all data-parallel ranks"), OnlyInStage3()
    ] = Field(1, ge=0)
    leaf_module: Annotated[
        FeatureDict | None, NotYet("mark modules with utils.set_z3_leaf_modules"), OnlyInStage3()
    ] = None
    stage3_gather_fp16_weights_on_model_save: Annotated[bool, OnlyInStage3()] = False
    """Old spelling of stage3_gather_16bit_weights_on_model_save."""

    @model_validator(mode="after")
    def _old_spellings(self) -> ZeroConfig:
        pin = {"pin_memory": bool(self.cpu_offload_use_pin_memory)}
        if self.cpu_offload and self.offload_optimizer is None:
            self.offload_optimizer = OffloadConfig(device="cpu", **pin)
        if self.cpu_offload_param and self.offload_param is None:
            self.offload_param = OffloadConfig(device="cpu", **pin)
        if self.stage3_gather_fp16_weights_on_model_save:
            self.gather_16bit_weights_on_model_save = True
        return self

    @model_validator(mode="after")
    def _check_offload_stage(self) -> ZeroConfig:
        offload = self.offload_optimizer
        if offload is not None and offload.device != "none" and self.stage < 1:
            raise ValueError("offload_optimizer needs ZeRO stage 1 or higher, not 0")
        return self


_DEEPSPEED_OPTIMIZERS = ("adagrad", "adam", "adamw", "lamb", "lion", "muadam", "muadamw", "musgd", "muon")


class OptimizerConfig(Section):
    """`optimizer`: `type` is Adam, AdamW, Adagrad, Lamb, Lion, Muon, SGD, or a class of torch.optim; `params` are
    the constructor's arguments."""

    type: str
    params: dict[str, Any] = {}
    legacy_fusion: Annotated[bool, NotYet("leave it out")] = False

    @property
    def reported_type(self) -> str:
        """The type as DeepSpeed reports it: its own optimizers in lower case, others as they were written."""
        return self.type.lower() if self.type.lower() in _DEEPSPEED_OPTIMIZERS else self.type


class SchedulerConfig(Section):
    """`scheduler`: `type` is WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle or LRRangeTest; `params` are
    the constructor's arguments."""

    type: str
    params: dict[str, Any] = {}


class CheckpointConfig(Section):
    """`checkpoint`."""

    ignores_unknown: ClassVar[bool] = True
    tag_validation: Literal["Ignore", "Warn", "Fail"] = "Warn"
    """What to do when ranks pass different tags to save_checkpoint."""
    load_universal: Annotated[
        bool, NoEffect("every checkpoint loads into any number of ranks without conversion")
    ] = False
    use_node_local_storage: Annotated[bool, NotYet("save to a file system that all nodes share")] = False
    parallel_write: Annotated[FeatureDict | None, NoEffect("every rank writes its own part already")] = None
    writer: Annotated[FeatureDict | None, NotYet("leave it out: files are written by each rank")] = None
    checkpoint_serialization: Annotated[
        bool, NoEffect("it is a choice between two formats of torch.save, and neither is used")
    ] = True
    format: Annotated[
        Literal["xtrain", "deepspeed"],
        NotYet("checkpoints are written in xtrain's own format"),
        OnlyNative(fine=("deepspeed",)),
    ] = "xtrain"

    @field_validator("tag_validation", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.capitalize() if isinstance(value, str) else value


class ActivationCheckpointingConfig(Section):
    """`activation_checkpointing`: how xtrain.checkpointing keeps activations; checkpointing.configure() wins."""

    ignores_unknown: ClassVar[bool] = True
    partition_activations: bool = False
    """Split the inputs of checkpointed functions over the model-parallel ranks of the mpu."""
    cpu_checkpointing: bool = False
    """Move them to host memory until backward."""
    contiguous_memory_optimization: bool = False
    """Copy the pieces into preallocated blocks; needs partition_activations and number_checkpoints."""
    number_checkpoints: int | None = Field(None, gt=0)
    """checkpoint() calls in one forward pass."""
    synchronize_checkpoint_boundary: bool = False
    """Wait for the device before and after each checkpointed function."""
    profile: bool = False
    """Log the time of each checkpointed forward pass and recomputation."""


_DEEPCOMPILE = NoEffect("it is only read with deepcompile")
_OLD_COMPILE = NotYet("call engine.compile(backend=...), as DeepSpeed, which has removed the key, wants too")


class CompileConfig(Section):
    """`compile`: of DeepSpeed's own compiler. engine.compile() is torch.compile and needs no key."""

    deepcompile: Annotated[bool, NotYet("call engine.compile(), which is torch.compile")] = False
    compile_enabled: Annotated[bool, _OLD_COMPILE] = Field(False, alias="enabled")
    disable: Annotated[bool, NoEffect("nothing is compiled unless the script calls engine.compile()")] = False
    backend: Annotated[str | None, _OLD_COMPILE] = None
    kwargs: Annotated[FeatureDict, _OLD_COMPILE] = {}
    autoep_non_moe: Annotated[bool, NotYet("call engine.compile(), which compiles the module")] = False
    free_activation: Annotated[bool, _DEEPCOMPILE] = False
    free_activation_threshold: Annotated[int, _DEEPCOMPILE] = 10 * 1024 * 1024
    offload_activation: Annotated[bool, _DEEPCOMPILE] = False
    offload_activation_pin_memory: Annotated[bool, _DEEPCOMPILE] = True
    offload_opt_states: Annotated[bool, _DEEPCOMPILE] = False
    offload_parameters: Annotated[bool, _DEEPCOMPILE] = False
    double_buffer: Annotated[bool, _DEEPCOMPILE] = True
    symmetric_memory: Annotated[bool, _DEEPCOMPILE] = False
    debug_log: Annotated[bool, _DEEPCOMPILE] = False
    sync_before_reduce: Annotated[bool, _DEEPCOMPILE] = False
    sync_after_reduce: Annotated[bool, _DEEPCOMPILE] = False
    sync_before_allgather: Annotated[bool, _DEEPCOMPILE] = False
    sync_after_allgather: Annotated[bool, _DEEPCOMPILE] = False
    keep_int_input_tensors: Annotated[bool, _DEEPCOMPILE] = True
    keep_all_input_tensors: Annotated[bool, _DEEPCOMPILE] = False
    passes: Annotated[list[str] | None, _DEEPCOMPILE] = None


class RecordConfig(Section):
    """`xtrain.record`: the run record (docs/record.md); a string means its path."""

    path: str | None = None
    """Path of the file (JSON Lines) that rank 0 writes. None: `metrics.jsonl` in the launcher's run folder."""
    modules_every: int | None = Field(None, gt=0)
    """Steps between two measurements of activations, gradients and parameters of each module. None: none."""
    modules: list[str] | None = None
    """Names of the modules to measure, with * and ?. None: those with parameters of their own, or no children."""


class XtrainSection(Section):
    """`xtrain`: what DeepSpeed has no key for."""

    backend: str | None = None
    """Name of the backend; overrides XTRAIN_BACKEND, DS_ACCELERATOR and detection."""
    engine: Literal["native", "deepspeed"] = "native"
    """"deepspeed": the installed DeepSpeed trains, on this backend and with this recorder. Every key of its config is
    then its own affair, and keys that only xtrain's engine has are refused."""
    strict: bool = False
    """Keys that nobody reads are errors; otherwise they are ignored, as in DeepSpeed, with a warning."""
    aligned: Annotated[bool, OnlyNative()] = False
    """Bits that do not depend on ZeRO stage or on how a batch is split over ranks and accumulation (powers
    of two): canonical sums in float32, one optimizer arithmetic, counter-based dropout. See docs/aligned.md."""
    seed: Annotated[int, OnlyNative()] = Field(1234, ge=0, lt=2**63)
    """Seed of the dropout masks in aligned mode."""
    max_skipped_steps: Annotated[int, OnlyNative()] = Field(20, ge=0)
    """Steps in a row with gradients that are not finite, after which training ends with an error; 0: never. Does not
    count where the loss scale adapts: there the smallest scale is the limit."""
    record: RecordConfig | None = None
    """What rank 0 writes of every step. None: no record, unless the launcher asks."""
    tokens_per_sample: int | None = Field(None, gt=0)
    """Tokens in one sample; with it the record and the progress display count tokens."""
    fake: FakeConfig | None = None
    """What the backend "fake" emulates."""
    sdc_check: Annotated[SdcCheckConfig | None, OnlyNative()] = None
    """Compare what ranks must have in common, now and then. None: never."""

    @field_validator("record", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


def _feature(instead: str) -> NotYet:
    """A feature that is off unless its section says `"enabled": true`."""
    return NotYet(instead, "enabled")


class Config(Section):
    """The whole configuration."""

    ignores_unknown: ClassVar[bool] = True
    train_batch_size: Count | None = None
    train_micro_batch_size_per_gpu: Count | None = None
    gradient_accumulation_steps: Count | None = None
    optimizer: OptimizerConfig | None = None
    scheduler: SchedulerConfig | None = None
    gradient_clipping: float = Field(1.0, ge=0)
    """Largest 2-norm of the gradients of all parameters; 0 means no clipping. The default is DeepSpeed's."""
    zero_optimization: ZeroConfig = ZeroConfig()
    bf16: Bf16Config = Bf16Config()
    fp16: Fp16Config = Fp16Config()
    torch_autocast: TorchAutocastConfig = TorchAutocastConfig()
    data_types: DataTypesConfig = DataTypesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    activation_checkpointing: ActivationCheckpointingConfig = ActivationCheckpointingConfig()
    compile: CompileConfig = CompileConfig()
    xtrain: XtrainSection = XtrainSection()
    zero_allow_untested_optimizer: bool = False
    communication_data_type: DtypeName | None = None
    """Dtype in which gradients travel. None: the one in which they are accumulated."""
    seq_parallel_communication_data_type: DtypeName | None = None
    """The same where the mpu divides sequences over ranks. None: fp32, as in DeepSpeed."""
    prescale_gradients: bool = False
    """Average over ranks before the reduction instead of after it."""
    gradient_predivide_factor: float = Field(1.0, gt=0)
    """Part of the average that is taken before the reduction (fp16 on many ranks may overflow without)."""
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    """How gradients of the ranks are combined; not "sum" in stage 3."""
    managed_gradient_accumulation: bool = True
    """False: every step() is an update, however many backwards ran before it."""
    disable_python_gc: bool = False
    """Switch Python's automatic garbage collection off; engine.collect_python_gc() collects."""
    steps_per_print: int | None = Field(None, ge=0)
    """Steps between two lines of progress with samples per second; 0, infinity or left out: none."""
    wall_clock_breakdown: bool = False
    """Time forward, backward, reduction and step, waiting for the device before each reading; see engine.timers."""
    memory_breakdown: bool = False
    """Print the memory in use around forward, backward and step."""
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    wandb: WandbConfig = WandbConfig()
    csv_monitor: CsvConfig = CsvConfig()
    comet: CometConfig = CometConfig()
    timers: TimersConfig = TimersConfig()
    flops_profiler: FlopsProfilerConfig = FlopsProfilerConfig()
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    dump_state: bool = False
    dataloader_drop_last: bool = False
    log_level: str | None = None

    # Not there yet.
    sparse_gradients: Annotated[bool, NotYet("use dense embedding gradients")] = False
    amp: Annotated[FeatureDict | None, _feature('use "bf16": {"enabled": true}')] = None
    tensor_parallel: Annotated[
        FeatureDict | None,
        NotYet("pass an mpu, with tensor-parallel layers of your own", "autotp_size", (None, False, 0, 1)),
    ] = None
    expert_parallel: Annotated[FeatureDict | None, _feature("use data parallelism")] = None
    sequence_parallel_size: Annotated[
        int, NotYet("pass mpu=xtrain.parallel.ProcessGrid(sequence=...) to initialize()")
    ] = 1
    data_parallel_size: Annotated[
        int | None, NotYet("leave it out: it is the number of ranks, or what mpu says")
    ] = None
    use_data_before_expert_parallelism: Annotated[bool, NotYet("use data parallelism")] = False
    elasticity: Annotated[FeatureDict | None, _feature("set train_batch_size")] = None
    autotuning: Annotated[FeatureDict | None, _feature("set the batch size by hand")] = None
    compression_training: Annotated[FeatureDict | None, NotYet("leave it out")] = None
    data_efficiency: Annotated[FeatureDict | None, _feature("sample in the script")] = None
    curriculum_learning: Annotated[FeatureDict | None, _feature("sample in the script")] = None
    progressive_layer_drop: Annotated[FeatureDict | None, _feature("drop layers in the model")] = None
    eigenvalue: Annotated[FeatureDict | None, _feature("leave it out")] = None
    quantize_training: Annotated[FeatureDict | None, _feature("leave it out")] = None
    weight_quantization: Annotated[
        FeatureDict | None, NotYet("leave it out", "quantized_initialization", (None, False, {}))
    ] = None
    sparse_attention: Annotated[FeatureDict | None, NotYet("choose the attention in the model")] = None
    hybrid_engine: Annotated[FeatureDict | None, _feature("leave it out")] = None
    nebula: Annotated[FeatureDict | None, _feature("use save_checkpoint, which writes atomically")] = None
    datastates_ckpt: Annotated[FeatureDict | None, NotYet("use save_checkpoint")] = None

    graph_harvesting: Annotated[bool, NotYet("leave it out")] = False

    # Accepted, without effect.
    pipeline: Annotated[
        FeatureDict | None, NoEffect("it is only read for a PipelineModule, which is not there yet")
    ] = None
    vocabulary_size: Annotated[int | None, NoEffect("DeepSpeed, too, only looks whether 8 divides it")] = None
    disable_allgather: Annotated[bool, _ONE_BUFFER] = False
    zero_force_ds_cpu_optimizer: Annotated[bool, NoEffect("every optimizer works on offloaded states")] = True
    aio: Annotated[FeatureDict | None, NoEffect("files are mapped into memory")] = None

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
