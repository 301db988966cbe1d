"""DeepSpeed's names that xtrain does not have, by feature, and what to use instead: the one place.

`xtrain.__getattr__`, the engine and the import system ask here before they fail. docs/compat.md shows
the table next to what there is; a test reports entries that are no longer true.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any, NamedTuple

from xtrain.base import stand_ins
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
        gone: patterns of what DeepSpeed 0.19.8 has no longer, and scripts still import.
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
        ("launcher.multinode_runner",),
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
        "set XTRAIN_BACKEND or the config key xtrain.backend",
        ("accelerator.set_accelerator",),
    ),
    Missing(
        "the config as an object with getters",
        "read engine.config, a dictionary, or engine.xtrain_config.values",
        ("engine.torch_autocast_*", 
         "engine.gradient_average", 
         "engine.update_interval",
         "engine.get_optimizer_configuration"),
    ),
    Missing(
        "helpers on optimizer states and models",
        "use torch's own, or engine.module, engine.optimizer and engine.grid",
        ("utils", "DeepSpeedOptimizer"),
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
        "sparse gradients",
        "use dense embedding gradients",
        ("runtime.sparse_tensor",),
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
         "engine.use_ds_comm", "engine.warn_unscaled_loss", "accelerator", "comm", "env_report", "launcher", "monitor",
         "runtime", "constants", "checkpointing", "compat", "_[!_]*"),
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


def _explaining(module: ModuleType) -> Callable[[str], Any]:
    """A `__getattr__` for the module: what its own one finds, else the table's error for a name of DeepSpeed's."""
    own: Callable[[str], Any] | None = vars(module).get("__getattr__")
    path = module.__name__.partition(".")[2]

    def find_attribute(name: str) -> Any:
        unknown = AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        if own is not None:
            try:
                return own(name)
            except AttributeError as error:
                unknown = error
        stand_in = stand_ins.get(f"{path}.{name}")
        if stand_in is not None:
            return stand_in
        if isinstance(unknown, MissingNameError):
            raise unknown
        raise name_error(f"{path}.{name}") or unknown

    return find_attribute


class _Loader(SourceFileLoader):
    """Loads a module at one of DeepSpeed's paths, and makes it explain the names that only DeepSpeed has."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        # `from MODULE import NAME` asks the import system, and so `Finder`, about packages only: it would say
        # "cannot import name". An empty path makes the module one, with nothing in it.
        module.__path__ = getattr(module, "__path__", [])
        vars(module)["__getattr__"] = _explaining(module)


class Explainer:
    """The first finder of the import system: finds xtrain's modules as ever, and has those that share a path with
    DeepSpeed's loaded by `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, below = fullname.partition(".")
        if package != "xtrain" or not below or find(f"{below}._") is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _StandInLoader:
    """Makes a module whose names all stand for something that is not there."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        entry = find(module.__name__.partition(".")[2])
        module.__doc__ = f"Not there yet ({entry.feature}): {entry.instead}." if entry else None
        vars(module)["__getattr__"] = _explaining(module)


class Finder:
    """The last finder of the import system: explains modules of DeepSpeed that no other one has found.

    It also serves `from MODULE import NAME`, which looks for a module when there is no such attribute.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, below = fullname.partition(".")
        entry = find(below) if package == "xtrain" and below else None
        if stand_ins.is_module(below):
            return ModuleSpec(fullname, _StandInLoader(), is_package=True)  # type: ignore[arg-type]
        if entry is not None and not below.rpartition(".")[2].startswith("__"):
            raise MissingModuleError(f"{below} ({entry.feature})", entry.instead)
        return None


def install() -> None:
    """Add the finders, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Explainer())
        sys.meta_path.append(Finder())
