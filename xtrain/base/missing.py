"""DeepSpeed's names that xtrain does not have, by feature, and what to use instead: the one place.

`xtrain.__getattr__`, the engine and the import system ask here before they fail. docs/compat.md shows
the table next to what there is; a test reports entries that are no longer true.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

from xtrain.base.errors import NotImplementedYetError

API_VERSION = "0.19.8"
"""Version of DeepSpeed that docs/compat.md compares with, and that xtrain stands for under the name `deepspeed`."""


class Missing(NamedTuple):
    """A feature of DeepSpeed that is not there.

    Attributes:
        feature: what the names are for.
        instead: what to do, as an order.
        names: patterns of dotted paths below `deepspeed`; those of the engine start with `engine.`. A
            module's pattern covers everything in it.
        gone: the same for what DeepSpeed 0.19.8 has no longer, and scripts still import; and for modules of DeepSpeed
            by the path that they have here.
    """

    feature: str
    instead: str
    names: tuple[str, ...]
    gone: tuple[str, ...] = ()


class MissingNameError(NotImplementedYetError, AttributeError):
    """`xtrain.NAME` or `engine.NAME` is not there; an AttributeError, so that `hasattr` answers False."""


class MissingModuleError(NotImplementedYetError, ImportError):
    """`import xtrain.NAME` is not there; an ImportError, so that `try: import` goes on."""


MISSING: tuple[Missing, ...] = (
    Missing(
        "pipeline parallelism",
        "pass an mpu with a pipeline of your own, or import it from deepspeed and let DeepSpeed's engine train",
        ("pipe", "runtime.pipe", "Pipeline*", "DualPipeV*", ),
    ),
    Missing(
        "mixture of experts",
        "write the layer in torch and train it data-parallel",
        ("moe", "*moe*", "*expert*", "engine.*all_to_all_group", "engine.gate_modules"),
    ),
    Missing(
        "tensor parallelism",
        "pass an mpu with your own tensor-parallel layers, or use data parallelism",
        ("*tensor_parallel*", "*tp_m*", "*autotp*", "load_ds_config", 
         "engine.uses_parallelization_pass_only"),
    ),
    Missing(
        "sequence parallelism",
        "pass an mpu whose sequence-parallel ranks share a sample, with attention of your own",
        ("sequence", "runtime.sequence_parallel"),
    ),
    Missing(
        "inference and generation",
        "run the trained module, engine.module, with torch or an inference server",
        ("inference*", "init_inference", "InferenceEngine", "DeepSpeedInferenceConfig", "model_implementations",
         "default_inference_config", "module_inject", "replace_transformer_layer", "*ybrid*ngine", "KV", "MLA_*",
         "QUERY", "NOT_HEAD_BLOCKED"),
    ),
    Missing(
        "LoRA and quantized layers",
        "use a library of such layers; the engine trains what has a gradient",
        ("linear", "engine.optimized_linear_*"),
    ),
    Missing(
        "fused transformer layers",
        "use torch.nn.functional.scaled_dot_product_attention in the model",
        ("ops.transformer", "ops.DeepSpeedTransformer*", "DeepSpeedTransformer*"),
    ),
    Missing(
        "compiled kernels",
        "take optimizers from xtrain.ops and xtrain.optim, which compile nothing",
        ("ops.op_builder",),
    ),
    Missing(
        "inner functions of Muon",
        "give the config's optimizer the type Muon, and mark parameters with `use_muon`",
        ("MUON_OPTIMIZER", "*muon*", "set_optimizer_flags"),
    ),
    Missing(
        "inner classes of offload",
        "use the sections zero_optimization.offload_optimizer and offload_param, or engine.offload_states()",
        ("io", "nvme", "*zenflow*", "ops.adam.ZenFlow*", "*offload*", 
         "engine.swap_tensor_config", "engine.cpuadam_cores_perc",
         "engine.zero_use_cpu_optimizer"),
    ),
    Missing(
        "inner classes of ZeRO",
        "use the names in xtrain.zero and xtrain.utils, which cover what scripts need",
        ("zero", "runtime.zero.*",
         "engine.is_first_weights_partition_group"),
    ),
    Missing(
        "conversion of checkpoints and their inner classes",
        "use load_checkpoint, which reads any number of ranks and any stage, and engine.save_16bit_model()",
        ("checkpoint.*", "runtime.checkpoint_engine", "runtime.state_dict_factory", "datastates",
         "engine.*checkpoint*"),
    ),
    Missing(
        "inner functions of timers and profilers",
        "use the config sections that docs/metrics.md describes, or torch.profiler",
        ("profiling", "engine.engine_timer*", "engine.*flops*", "engine.*breakdown*",
         "engine.summary_events", "engine.fwd_duration", "comm.timers", "comm.*log*", "comm.timed_op"),
    ),
    Missing(
        "autotuning",
        "set train_micro_batch_size_per_gpu by hand",
        ("autotuning", "engine.autotuning_*"),
    ),
    Missing(
        "the launcher's inner parts",
        "give the command's options to xtrain deepspeed (docs/howto/deepspeed_command.md)",
        ("launcher",),
    ),
    Missing(
        "a report of the environment",
        "run xtrain doctor, which says what is on this machine and whether it works",
        ("env_report",),
    ),
    Missing(
        "helpers for the arguments of schedules",
        "write the config's section scheduler, or pass a scheduler to initialize()",
        ("runtime.lr_schedules",),
    ),
    Missing(
        "the loader's class",
        "pass training_data to initialize(), call engine.deepspeed_io(), or use torch's DataLoader",
        ("runtime.dataloader",),
    ),
    Missing(
        "data efficiency",
        "sample and schedule in the script's own loader",
        ("runtime.data_pipeline", "ops.random_ltd", "engine.*random_ltd*", "engine.*curriculum*", "engine.data_*",
         "DeepSpeedDataLoader"),
    ),
    Missing(
        "DeepCompile",
        "call torch.compile on the model before initialize()",
        ("compile", "runtime.compiler", "engine.*compile*", "engine.get_autosp_backend"),
    ),
    Missing(
        "inner functions of gradient reduction",
        "let the engine reduce, or call xtrain.comm with the same group",
        ("engine.all_gather_scalar", "engine.*allreduce*", "engine.sparse_*", "comm.enable_symm_mem_for_group"),
    ),
    Missing(
        "launchers' environments inside comm",
        "call init_distributed, which reads every launcher it knows (docs/launchers.md)",
        ("comm.*_from_launcher", "comm.in_*", "comm.patch_*", "comm.set_backend",
         "comm.init_deepspeed_backend", "comm.*Backend"),
    ),
    Missing(
        "the choice of an accelerator",
        "call get_accelerator(), and set XTRAIN_BACKEND or the config key xtrain.backend",
        ("accelerator",),
    ),
    Missing(
        "the config as an object with getters",
        "read engine.config, a dictionary, or engine.xtrain_config.values",
        ("runtime.config", "runtime.config_utils", "engine.torch_autocast_*", 
         "engine.gradient_average", 
         "engine.update_interval",
         "engine.get_optimizer_configuration"),
    ),
    Missing(
        "helpers on optimizer states and models",
        "use torch's own, or engine.module, engine.optimizer and engine.grid",
        ("utils", "runtime.utils", "runtime.base_optimizer", "DeepSpeedOptimizer"),
    ),
    Missing(
        "DeepSpeed's own optimizers for fp16 and bf16",
        "use engine.optimizer, which is one class for all dtypes",
        ("runtime.fp16",),
    ),
    Missing(
        "compression and pruning",
        "use a library for it (torch.ao, say) before or after the training",
        (),
        ("compression",),
    ),
    Missing(
        "kernels for one kind of model or chip",
        "use torch's own operators, or kernels of the script's own",
        ("ops",),
    ),
    Missing(
        "compressed communication",
        "set communication_data_type, or train with \"engine\": \"deepspeed\"",
        ("runtime.comm",),
    ),
    Missing(
        "roll-outs for reinforcement learning",
        "generate with the module itself, inside GatheredParameters in stage 3",
        ("runtime.rollout",),
    ),
    Missing(
        "elastic batch sizes",
        "set train_batch_size; xtrain launch restarts with fewer nodes (docs/launchers.md)",
        (),
        ("elasticity",),
    ),
    Missing(
        "layer dropping and eigenvalues",
        "drop layers in the model, and compute eigenvalues in the script",
        (),
        ("runtime.progressive_layer_drop", "runtime.eigenvalue"),
    ),
    Missing(
        "checkpoints on Nebula",
        "use save_checkpoint, which writes atomically",
        (),
        ("nebula",),
    ),
    Missing(
        "DeepSpeed's inner workings",
        "do without: no counterpart is planned unless a script needs it",
        ("git_*", "comm.get_*", 
         "engine.is_*_style_dataset", 
         "engine.collate_fn", 
         "engine.dist_backend", "engine.dont_change_device", "engine.*flatten",
         "engine.first_dataloader_check", "engine.inside_no_sync_ctxt", "engine.losses", "engine.mesh_device",
         "engine.module_forward_*_hook", "engine.scale_wrt_gas", "engine.training_data",
         "engine.use_ds_comm", "engine.warn_unscaled_loss", "comm", "monitor", "runtime", "constants",
         "checkpointing", "compat", "_[!_]*"),
        ("activation_checkpointing.checkpointing",),
    ),
)  # fmt: skip
"""Earlier entries win where two cover a name."""


def covers(pattern: str, path: str) -> bool:
    """Whether a pattern of the table stands for a dotted path."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")


def find(path: str) -> Missing | None:
    """The table's entry for a dotted path below `deepspeed`; the first that covers it."""
    return next((entry for entry in MISSING if any(covers(p, path) for p in entry.names + entry.gone)), None)


def name_error(path: str) -> MissingNameError | None:
    """The error for an attribute that the table knows, else None."""
    entry = None if path.rpartition(".")[2].startswith("__") else find(path)
    return None if entry is None else MissingNameError(f"{path} ({entry.feature})", entry.instead)
