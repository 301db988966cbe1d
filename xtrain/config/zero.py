"""Configuration section `zero_optimization`: how training states are divided over ranks and where they live.

Part of the schema (schema.py). Sizes are in elements, as DeepSpeed's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from xtrain.config.rules import FeatureDict, NoEffect, NotYet, OnlyInStage3, Section

ONE_BUFFER = NoEffect("xtrain always reduces and gathers whole buckets of one flat buffer")
_WHOLE_GROUPS = NoEffect("stage 3 gathers param groups, each with one all-gather, and frees them after use")
_NO_QUANTIZED = NotYet("leave it out: communication uses the gradients' own dtype")
_ALL_RANKS = NotYet("leave it out: parameters are divided over all data-parallel ranks")
_MAPPED = NoEffect("files are mapped into memory, and the operating system reads and writes them")


class OffloadConfig(Section):
    """States that live in host memory or on disk instead of on the device."""

    device: Literal["none", "cpu", "nvme"] = "none"
    """Where they live: "none" on the device, "cpu" in host memory, "nvme" in files on a local disk of any kind. "cpu"
    changes nothing where the device is the host itself."""
    nvme_path: str | None = None
    """Folder on a local disk for device "nvme", which needs it. The files disappear when the process ends."""
    pin_memory: bool = True
    """For device "cpu": use page-locked memory, where the backend has it. Copies are faster, but the memory cannot be
    swapped out. With DS_PIN_MEMORY_BACKEND=native in the environment the operating system locks it, on every backend
    and where the device is the host, too; no device is told of it."""
    buffer_count: Annotated[int | None, _MAPPED] = Field(None, ge=0)
    """In DeepSpeed: number of buffers between memory and disk."""
    buffer_size: Annotated[int | None, _MAPPED] = Field(None, ge=0)
    """In DeepSpeed: elements in each of these buffers (parameters only)."""
    max_in_cpu: Annotated[int | None, _MAPPED] = Field(None, ge=0)
    """In DeepSpeed: parameter elements that stay in host memory when the rest goes to disk."""
    pipeline_read: Annotated[bool, _MAPPED] = False
    """In DeepSpeed: read the next part of the states from disk while the current one is updated."""
    pipeline_write: Annotated[bool, _MAPPED] = False
    """In DeepSpeed: write the last part of the states to disk while the current one is updated."""
    fast_init: Annotated[bool, _MAPPED] = False
    """In DeepSpeed: a faster start of the optimizer when its states go to disk."""
    ratio: Annotated[float, NotYet("states are offloaded all or none: leave it out")] = Field(1.0, ge=0, le=1)
    """In DeepSpeed's stage 3: the share of the optimizer's states that is offloaded, from 0 to 1."""
    super_offload: Annotated[bool, NotYet('use "device": "cpu" alone')] = False
    """In DeepSpeed's stage 3: offloading for processors and GPUs that share one package (Grace Hopper)."""
    cpuadam_cores_perc: Annotated[float, NoEffect("it is only read with super_offload")] = 0.8
    """In DeepSpeed: the share of processor cores, from 0 to 1, that computes Adam with super_offload."""

    @property
    def pipeline(self) -> bool:
        """Whether pipelined reads or writes were asked for."""
        return self.pipeline_read or self.pipeline_write


LEAF_MODULE_CLASSES = (
    "transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
)
"""DeepSpeed's defaults. Models without such modules are not concerned."""


def _texts(given: Any) -> Any:
    """One text as a list of it; without what comes twice."""
    entries = [given] if isinstance(given, str) else given
    return list(dict.fromkeys(map(str, entries))) if isinstance(entries, list | tuple) else entries


_Texts = Annotated[list[str], BeforeValidator(_texts)]


class LeafModuleConfig(Section):
    """Which modules are gathered as one in stage 3."""

    classes: _Texts = Field(default_factory=lambda: list(LEAF_MODULE_CLASSES))
    """Names of classes, with or without their module."""
    names: _Texts = Field(default_factory=list)
    """Names of modules, as named_modules() has them."""
    name_suffixes: _Texts = Field(default_factory=list)
    """Ends of names of modules."""


class ZeroConfig(Section):
    """Which states are divided over the data-parallel ranks, and how they travel. Sizes are in elements."""

    stage: int = Field(0, ge=0, le=3)
    """What is divided over the ranks: 0 nothing, 1 master weights and optimizer states, 2 gradients too, 3 parameters
    too."""
    reduce_bucket_size: int | None = Field(None, gt=0)
    """Elements that are reduced at a time. Left out: the backend's size in bytes (docs/backends.md). DeepSpeed's
    default is 5e8, which is one bucket for most models. Stage 3 reduces by param groups instead."""
    overlap_comm: bool | None = None
    """Reduce a bucket as soon as its last gradient has arrived, while backward goes on. Left out: the backend's choice,
    which is true on all of xtrain's own."""
    ignore_unused_parameters: bool = True
    """False: an error on every rank when a parameter received no gradient in a step on any rank."""
    compute_grad_norm: bool = True
    """False: do not compute the gradient norm, which is then reported as None. Stages 1 and 2 only, and
    gradient_clipping must be 0."""

    contiguous_gradients: Annotated[bool, ONE_BUFFER] = True
    """In DeepSpeed: copy gradients into one contiguous buffer as they arrive."""
    reduce_scatter: Annotated[bool, ONE_BUFFER] = True
    """In DeepSpeed: average gradients by a reduce or reduce-scatter instead of an all-reduce."""
    use_multi_rank_bucket_allreduce: Annotated[bool, ONE_BUFFER] = True
    """In DeepSpeed: reduce the buckets of several ranks by one all-reduce."""
    allgather_partitions: Annotated[bool, ONE_BUFFER] = True
    """In DeepSpeed: collect updated parameters by an all-gather instead of broadcasts."""
    allgather_bucket_size: Annotated[int, ONE_BUFFER] = Field(500_000_000, ge=0)
    """In DeepSpeed: elements that are gathered at a time after the update."""
    round_robin_gradients: Annotated[bool, ONE_BUFFER] = False
    """In DeepSpeed: deal gradients out to ranks in turn, so that copies to the host run on all of them."""
    parameter_alignment: Annotated[
        bool, NoEffect("every parameter is aligned in its flat buffer already")
    ] = False
    """In DeepSpeed: start each parameter at an aligned address of the flat buffer."""
    elastic_checkpoint: Annotated[bool, NoEffect("every checkpoint loads into any number of ranks")] = False
    """In DeepSpeed: an old kind of checkpoint that loads into another number of ranks."""
    legacy_stage1: Annotated[bool, NoEffect("there is one implementation of stage 1")] = False
    """In DeepSpeed: use its old implementation of stage 1."""

    load_from_fp32_weights: bool = True
    """What load_checkpoint restores master weights from. True: the checkpoint's fp32 masters. False, in stages 1 to 3:
    its 16-bit weights, so that digits are lost."""
    offload_param: Annotated[OffloadConfig | None, OnlyInStage3()] = None
    """Where this rank's slices of the parameters live."""
    offload_optimizer: OffloadConfig | None = None
    """Where master weights and optimizer states live; the update is computed there. Stages 1 to 3."""
    cpu_offload: bool | None = None
    """Old spelling of offload_optimizer with device cpu."""
    cpu_offload_param: bool | None = None
    """Old spelling of offload_param with device cpu."""
    cpu_offload_use_pin_memory: bool | None = None
    """Old spelling of pin_memory in both. Left out, they take ordinary memory."""
    zenflow: Annotated[FeatureDict | None, NotYet("use offload_optimizer alone", by_presence=True)] = None
    """In DeepSpeed: update the most important gradients at once on the device, and the others later on the host."""
    zero_quantized_weights: Annotated[bool, _NO_QUANTIZED, OnlyInStage3()] = False
    """In DeepSpeed (ZeRO++): gather parameters in int8."""
    zero_quantized_nontrainable_weights: Annotated[bool, _NO_QUANTIZED, OnlyInStage3()] = False
    """In DeepSpeed: keep frozen parameters in a quantized form, as for LoRA."""
    zero_quantized_gradients: Annotated[bool, _NO_QUANTIZED, OnlyInStage3()] = False
    """In DeepSpeed (ZeRO++): reduce gradients in a quantized form."""

    prefetch_bucket_size: Annotated[int, OnlyInStage3()] = Field(
        50_000_000, ge=0, alias="stage3_prefetch_bucket_size"
    )
    """Elements gathered ahead of use; 0: none. Left out: the next param group, whatever its size."""
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
    """A param group is kept for its next use only while no more elements than this are whole. Matters only with
    stage3_max_reuse_distance."""
    max_reuse_distance: Annotated[int, OnlyInStage3()] = Field(
        1_000_000_000, ge=0, alias="stage3_max_reuse_distance"
    )
    """A param group is kept if no more elements than this are used before it is used again. Left out: every group is
    freed after use."""
    gather_16bit_weights_on_model_save: Annotated[bool, OnlyInStage3()] = Field(
        False, alias="stage3_gather_16bit_weights_on_model_save"
    )
    """Let save_16bit_model make the weights whole on rank 0 and write them. False: it writes nothing in stage 3."""
    sub_group_size: Annotated[int, NoEffect("the optimizer works bucket by bucket")] = Field(
        1_000_000_000, ge=0
    )
    """In DeepSpeed: elements that the optimizer updates at a time."""
    module_granularity_threshold: Annotated[
        int, NoEffect("the blocks of a model are gathered as one; utils.set_z3_leaf_modules marks others")
    ] = Field(0, alias="stage3_module_granularity_threshold")
    """In DeepSpeed: modules with fewer parameters for each submodule than this are gathered as one; 0: none."""
    use_all_reduce_for_fetch_params: Annotated[bool, _WHOLE_GROUPS] = Field(
        False, alias="stage3_use_all_reduce_for_fetch_params"
    )
    """In DeepSpeed: gather parameters by an all-reduce."""
    allgather_sequential: Annotated[bool, _WHOLE_GROUPS] = Field(False, alias="stage3_allgather_sequential")
    """In DeepSpeed: gather parameters one after the other, without a bucket, to save memory."""
    memory_efficient_linear: Annotated[
        bool,
        NoEffect("what backward needs of a parameter is freed and gathered again with it, in every layer"),
    ] = True
    """In DeepSpeed: a linear layer that does not keep its gathered weight for backward."""
    pipeline_loading_checkpoint: Annotated[bool, NoEffect("every rank reads its own part")] = False
    """In DeepSpeed: read a checkpoint one rank after the other, to save host memory."""
    override_module_apply: Annotated[
        bool, NoEffect("inside zero.Init, Module.apply always makes a module's parameters whole")
    ] = True
    """In DeepSpeed: let Module.apply see whole parameters while a model is built."""
    log_trace_cache_warnings: Annotated[
        bool, NoEffect("an iteration that differs from the last one is gathered without prefetching")
    ] = False
    """In DeepSpeed: warn when the order of modules differs from the recorded one."""
    enable_sanity_checks: Annotated[bool, OnlyInStage3()] = False
    """Leaving zero.GatheredParameters without a modifier_rank is an error if a parameter was changed inside."""
    save_muon_momentum_buffer_in_memory: Annotated[bool, NoEffect("optimizer states are kept in memory")] = (
        False
    )
    """In DeepSpeed: keep Muon's momentum in memory when the other states go to disk."""
    mics_shard_size: Annotated[int, _ALL_RANKS, OnlyInStage3()] = -1
    """In DeepSpeed (MiCS): ranks over which the states are divided; groups of so many ranks hold copies. -1: all."""
    mics_hierarchical_params_gather: Annotated[bool, NotYet("leave it out")] = False
    """In DeepSpeed (MiCS): gather parameters in two steps, across nodes and inside them."""
    zeropp_loco_param: Annotated[FeatureDict | None, _NO_QUANTIZED] = None
    """In DeepSpeed (LoCo): how the error of quantized gradients is carried over to later steps."""
    zero_hpz_partition_size: Annotated[int, _ALL_RANKS, OnlyInStage3()] = Field(1, ge=0)
    """In DeepSpeed (ZeRO++): ranks in a group, usually a node, that keeps a second copy of the parameters, so that
    backward gathers inside the group."""
    leaf_module: Annotated[LeafModuleConfig, OnlyInStage3()] = Field(
        default_factory=lambda: LeafModuleConfig()
    )
    """Modules whose parameters are gathered as one, however many submodules they have: those of which not every
    submodule runs each time, such as mixtures of experts. utils.set_z3_leaf_modules marks them from a script."""
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
