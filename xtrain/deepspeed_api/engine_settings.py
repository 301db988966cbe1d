"""What the config says, under DeepSpeedEngine's method names: one getter a line.

State and counters are in engine_state.py, actions in engine_actions.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xtrain.base.errors import NotImplementedYetError
from xtrain.config.combine import check_parameter_dtype
from xtrain.engine.build import cast_module
from xtrain.engine.engine import Engine
from xtrain.precision.policy import DTYPES
from xtrain.runtime.config import DeepSpeedConfig

Getter = Callable[["EngineSettings"], Any]


def _key(path: str) -> Getter:
    """A method that returns the value of a configuration key."""

    def getter(self: EngineSettings) -> Any:
        value: Any = self.xtrain_config.values
        for part in path.split("."):
            value = getattr(value, part)
        return value

    getter.__doc__ = f"Value of the configuration key `{path}`."
    return getter


def _enabled(section: str) -> Getter:
    """A method that tells whether a section of the config is there and enabled."""

    def getter(self: EngineSettings) -> bool:
        value: Any = getattr(self.xtrain_config.values, section)
        flags = value if isinstance(value, dict) else vars(value) if value is not None else {}
        return bool(flags) and bool(flags.get("enabled", True))

    getter.__doc__ = f"Whether the configuration section `{section}` is enabled."
    return getter


class EngineSettings(Engine):
    """Getters of XtrainEngine for configuration keys; None where the key was left out."""

    @property
    def _config(self) -> DeepSpeedConfig:
        """The config as an object with DeepSpeed's attribute names; DeepSpeed's private name, which scripts read."""
        if "_deepspeed_config" not in self.__dict__:
            self.__dict__["_deepspeed_config"] = DeepSpeedConfig(self.xtrain_config.raw, self.mpu)
        config: DeepSpeedConfig = self.__dict__["_deepspeed_config"]
        return config

    def gradient_clipping(self) -> float:
        """Value of the configuration key `gradient_clipping`."""
        clipping: float = self._config.gradient_clipping
        return clipping

    # What subclasses of DeepSpeedEngine call: the parts of its set-up that concern dtypes.

    def _mixed_precision_dtypes(self) -> tuple[torch.dtype | None, torch.dtype | None]:
        """What parameters and buffers are cast to; None: nothing."""
        param = torch.float16 if self.fp16_enabled() else torch.bfloat16 if self.bfloat16_enabled() else None
        buffer = self._config.buffer_dtype
        return param, None if buffer is None else DTYPES[buffer]

    def _assert_valid_mixed_precision_config(self) -> None:
        """Raises ConfigError where `data_types.param_dtype` contradicts the sections fp16 and bf16."""
        check_parameter_dtype(self._config.param_dtype, self.fp16_enabled(), self.bfloat16_enabled())

    def _cast_module_mixed_precision(
        self, param_dtype: torch.dtype | None, buffer_dtype: torch.dtype | None, is_zero_init_model: bool
    ) -> None:
        """Cast the module; parameters that `zero.Init` has divided are left to it."""
        cast_module(self.module, None if is_zero_init_model else param_dtype, buffer_dtype)

    # Training
    managed_gradient_accumulation = _key("managed_gradient_accumulation")
    gradient_predivide_factor = _key("gradient_predivide_factor")
    steps_per_print = _key("steps_per_print")
    dump_state = _key("dump_state")
    log_level = _key("log_level")
    dataloader_drop_last = _key("dataloader_drop_last")
    wall_clock_breakdown = _key("wall_clock_breakdown")
    memory_breakdown = _key("memory_breakdown")
    zero_allow_untested_optimizer = _key("zero_allow_untested_optimizer")
    zero_force_ds_cpu_optimizer = _key("zero_force_ds_cpu_optimizer")
    use_node_local_storage = _key("checkpoint.use_node_local_storage")
    load_universal_checkpoint = _key("checkpoint.load_universal")

    # Precision
    bfloat16_enabled = _key("bf16.enabled")
    bf16_master_weights_and_gradients = _key("bf16.bf16_master_weights_and_grads")
    bf16_optimizer_states = _key("bf16.bf16_optimizer_states")
    fp16_enabled = _key("fp16.enabled")
    fp16_auto_cast = _key("fp16.auto_cast")
    fp16_master_weights_and_gradients = _key("fp16.fp16_master_weights_and_grads")
    torch_autocast_enabled = _key("torch_autocast.enabled")
    amp_enabled = _enabled("amp")

    # ZeRO
    zero_optimization_stage = _key("zero_optimization.stage")
    zero_reduce_scatter = _key("zero_optimization.reduce_scatter")
    zero_overlap_comm = _key("zero_optimization.overlap_comm")
    zero_offload_optimizer = _key("zero_optimization.offload_optimizer")
    zero_offload_param = _key("zero_optimization.offload_param")
    zero_sub_group_size = _key("zero_optimization.sub_group_size")
    zero_reduce_bucket_size = _key("zero_optimization.reduce_bucket_size")
    zero_multi_rank_bucket_allreduce = _key("zero_optimization.use_multi_rank_bucket_allreduce")
    zero_allgather_bucket_size = _key("zero_optimization.allgather_bucket_size")
    zero_allgather_partitions = _key("zero_optimization.allgather_partitions")
    zero_allgather_sequential = _key("zero_optimization.allgather_sequential")
    zero_compute_grad_norm = _key("zero_optimization.compute_grad_norm")
    zero_contiguous_gradients = _key("zero_optimization.contiguous_gradients")
    zero_load_from_fp32_weights = _key("zero_optimization.load_from_fp32_weights")
    zero_elastic_checkpoint = _key("zero_optimization.elastic_checkpoint")
    zero_max_live_parameters = _key("zero_optimization.max_live_parameters")
    zero_max_reuse_distance = _key("zero_optimization.max_reuse_distance")
    zero_prefetch_bucket_size = _key("zero_optimization.prefetch_bucket_size")
    zero_module_granularity_threshold = _key("zero_optimization.module_granularity_threshold")
    zero_param_persistence_threshold = _key("zero_optimization.param_persistence_threshold")
    zero_model_persistence_threshold = _key("zero_optimization.model_persistence_threshold")
    zero_gather_16bit_weights_on_model_save = _key("zero_optimization.gather_16bit_weights_on_model_save")
    zero_legacy_stage1 = _key("zero_optimization.legacy_stage1")
    zero_ignore_unused_parameters = _key("zero_optimization.ignore_unused_parameters")
    zero_save_muon_momentum_buffer_in_memory = _key("zero_optimization.save_muon_momentum_buffer_in_memory")
    zero_round_robin_gradients = _key("zero_optimization.round_robin_gradients")
    zero_parameter_alignment = _key("zero_optimization.parameter_alignment")
    zero_hpz_partition_size = _key("zero_optimization.zero_hpz_partition_size")
    zero_quantized_weights = _key("zero_optimization.zero_quantized_weights")
    zero_quantized_nontrainable_weights = _key("zero_optimization.zero_quantized_nontrainable_weights")
    zero_quantized_gradients = _key("zero_optimization.zero_quantized_gradients")
    zero_log_trace_cache_warnings = _key("zero_optimization.log_trace_cache_warnings")
    is_sanity_checks_enabled = _key("zero_optimization.enable_sanity_checks")
    zenflow_config = _key("zero_optimization.zenflow")
    aio_config = _key("aio")
    tensor_parallel_config = _key("tensor_parallel")

    # Features with a section of their own
    flops_profiler_enabled = _key("flops_profiler.enabled")
    flops_profiler_recompute_fwd_factor = _key("flops_profiler.recompute_fwd_factor")
    flops_profiler_profile_step = _key("flops_profiler.profile_step")
    flops_profiler_module_depth = _key("flops_profiler.module_depth")
    flops_profiler_top_modules = _key("flops_profiler.top_modules")
    flops_profiler_detailed = _key("flops_profiler.detailed")
    flops_profiler_output_file = _key("flops_profiler.output_file")
    autotuning_enabled = _enabled("autotuning")
    data_efficiency_enabled = _enabled("data_efficiency")
    data_efficiency_config = _key("data_efficiency")
    curriculum_learning_enabled = _enabled("curriculum_learning")
    is_deepcompile_enabled = _key("compile.deepcompile")

    def zero_optimization(self) -> bool:
        """Whether any state is partitioned."""
        return bool(self.xtrain_config.values.zero_optimization.stage > 0)

    def zero_optimization_partition_gradients(self) -> bool:
        """Whether gradients are partitioned (stage 2 and 3)."""
        return self.xtrain_config.values.zero_optimization.stage >= 2

    def zero_optimization_partition_weights(self) -> bool:
        """Whether parameters are partitioned (stage 3)."""
        return self.xtrain_config.values.zero_optimization.stage >= 3

    def zero_cpu_offload(self) -> bool:
        """Whether optimizer states live in host memory."""
        section: Any = self.xtrain_config.values.zero_optimization.offload_optimizer
        device = section.get("device") if isinstance(section, dict) else getattr(section, "device", None)
        return device == "cpu"

    def postscale_gradients(self) -> bool:
        """Whether gradients are averaged after the reduction."""
        return not self.xtrain_config.values.prescale_gradients

    def get_data_types(self) -> tuple[torch.dtype, torch.dtype]:
        """(parameters, accumulated gradients)."""
        values = self.xtrain_config.values
        model = (
            torch.float16 if values.fp16.enabled else torch.bfloat16 if values.bf16.enabled else torch.float32
        )
        accumulated = values.data_types.grad_accum_dtype
        return model, DTYPES[accumulated] if accumulated else model

    @property
    def communication_data_type(self) -> torch.dtype:
        """Dtype in which gradients travel: the key's, else the one in which they are accumulated."""
        name = self.xtrain_config.values.communication_data_type
        return DTYPES[name] if name else self.get_data_types()[1]

    @communication_data_type.setter
    def communication_data_type(self, value: Any) -> None:
        raise NotImplementedYetError(
            "setting engine.communication_data_type", "set communication_data_type in the config"
        )

    def torch_autocast_dtype(self) -> torch.dtype | None:
        """Dtype of the forward pass under autocast; None when the section is off."""
        section = self.xtrain_config.values.torch_autocast
        return DTYPES[section.dtype] if section.enabled else None

    def torch_autocast_lower_precision_safe_modules(self) -> list[str]:
        """Modules whose gradients may travel in the autocast dtype, as the config names them."""
        return self.xtrain_config.values.torch_autocast.lower_precision_safe_modules or []

    def initial_dynamic_scale(self) -> float:
        """Loss scale of the first step when it adapts."""
        return 2.0**self.xtrain_config.values.fp16.initial_scale_power

    def dynamic_loss_scale_args(self) -> dict[str, Any]:
        """How the loss scale adapts, under DeepSpeed's names."""
        fp16 = self.xtrain_config.values.fp16
        return {
            "init_scale": 2**fp16.initial_scale_power,
            "scale_window": fp16.loss_scale_window,
            "delayed_shift": fp16.hysteresis,
            "consecutive_hysteresis": fp16.consecutive_hysteresis,
            "min_scale": fp16.min_loss_scale,
        }

    def optimizer_params(self) -> dict[str, Any] | None:
        """Arguments of the config's optimizer."""
        section = self.xtrain_config.values.optimizer
        return None if section is None else section.params

    def optimizer_legacy_fusion(self) -> bool:
        """Always False: there is one implementation."""
        return False

    def scheduler_name(self) -> str | None:
        """Type of the config's scheduler."""
        section = self.xtrain_config.values.scheduler
        return None if section is None else section.type

    def scheduler_params(self) -> dict[str, Any] | None:
        """Arguments of the config's scheduler."""
        section = self.xtrain_config.values.scheduler
        return None if section is None else section.params

    def checkpoint_tag_validation_enabled(self) -> bool:
        """Whether ranks compare their tags in save_checkpoint."""
        return self.xtrain_config.values.checkpoint.tag_validation != "Ignore"

    def checkpoint_tag_validation_fail(self) -> bool:
        """Whether different tags are an error."""
        return self.xtrain_config.values.checkpoint.tag_validation == "Fail"
