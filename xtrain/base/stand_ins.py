"""Names of features that are not there, which scripts import at their top and often never use: they can be imported.

Using one raises what missing.py says about its feature. Only names that public repositories import without a way out
are here (tests/deepspeed_api/public_names.json); all others are refused at the import, so that `try: import` goes on.
Constants have DeepSpeed's values.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from xtrain.base.errors import NotImplementedYetError
from xtrain.base.missing import find

_CLASSES: dict[str, str] = {
    "": "PipelineEngine PipelineModule+ DeepSpeedTransformerConfig DeepSpeedTransformerLayer+",
    "checkpoint": "DeepSpeedCheckpoint",
    "comm": "TorchBackend",
    "inference": "DeepSpeedTPConfig RaggedInferenceEngineConfig",
    "inference.v2.ragged": "DSStateManagerConfig",
    "io": "FastFileWriter FastFileWriterConfig MockFileWriter PyFileWriter",
    "module_inject.layers": "GatherReplacedLayerParams",
    "module_inject.replace_policy": "HFGPT2LayerPolicy",
    "moe.sharded_moe": "MOELayer+ TopKGate+",
    "ops.adam.multi_tensor_apply": "MultiTensorApply",
    "runtime.checkpoint_engine.torch_checkpoint_engine": "TorchCheckpointEngine",
    "runtime.data_pipeline.data_routing.basic_layer": "RandomLayerTokenDrop+",
    "runtime.data_pipeline.data_routing.scheduler": "RandomLTDScheduler",
    "runtime.data_pipeline.data_sampling.data_analyzer": "DataAnalyzer",
    "runtime.data_pipeline.data_sampling.data_sampler": "DeepSpeedDataSampler",
    "runtime.data_pipeline.data_sampling.indexed_dataset": "MMapIndexedDataset",
    "runtime.dataloader": "DeepSpeedDataLoader",
    "runtime.domino.transformer": "DominoTransformer+",
    "runtime.hybrid_engine": "DeepSpeedHybridEngine",
    "runtime.pipe.engine": "PipelineEngine",
    "runtime.pipe.module": "PipelineModule+ LayerSpec TiedLayerSpec",
    "runtime.pipe": "PipelineModule+ LayerSpec TiedLayerSpec",
    "runtime.pipe.schedule": "BackwardPass ForwardPass LoadMicroBatch OptimizerStep RecvActivation RecvGrad "
    "ReduceGrads ReduceTiedGrads SendActivation SendGrad BufferOpInstruction InferenceSchedule PipeInstruction "
    "PipeSchedule TrainSchedule",
    "runtime.sequence_parallel.ulysses_sp": "UlyssesSPAttentionHF+ TiledMLP UlyssesSPDataLoaderAdapter",
    "runtime.state_dict_factory": "SDLoaderFactory MegatronSDLoader",
    "sequence.fpdt_layer": "FPDT_Attention+ FPDT_FFN FPDT_InputConstruct+ FPDT_LogitsLoss",
}
"""By module below `deepspeed`; with a plus, a torch module."""
_FUNCTIONS: dict[str, str] = {
    "": "init_inference tp_model_init replace_transformer_layer",
    "checkpoint": "enable_universal_checkpoint get_layer_ckpt_name_for_rank get_model_ckpt_name_for_rank "
    "get_zero_ckpt_name_for_rank",
    "compile.passes.offload_adam_states": "move_opt_states move_opt_states_sync offload_adam_states_for_init",
    "compile.passes.prefetch": "schedule_prefetch",
    "compile.passes.selective_gather": "selective_gather",
    "compile.passes.sp_compile": "prepare_autosp_inputs",
    "compile.passes.zero3_compile": "add_z3_gather_release",
    "compression.compress": "init_compression redundancy_clean",
    "module_inject": "replace_transformer_layer",
    "module_inject.policy": "transpose",
    "runtime.data_pipeline.data_routing.helper": "convert_to_random_ltd remove_random_ltd_state_dict "
    "save_without_random_ltd",
    "runtime.data_pipeline.data_sampling.variable_batch_size_and_lr": "get_dataloader_and_lr_scheduler_for_"
    "variable_batch_size_deepspeed",
    "runtime.pipe.p2p": "recv send",
}
_CONSTANTS: dict[str, dict[str, Any]] = {
    "checkpoint.deepspeed_checkpoint": {"ARGS_KEY": "args", "CHECKPOINT_INFO_KEY": "checkpoint_info"},
    "runtime.constants": {"PIPE_REPLICATED": "ds_pipe_replicated"},
    "runtime.data_pipeline.constants": {
        "CURRICULUM_LEARNING": "curriculum_learning",
        "CURRICULUM_LEARNING_ENABLED": "enabled",
        "DATA_EFFICIENCY": "data_efficiency",
        "DATA_ROUTING": "data_routing",
        "DATA_SAMPLING": "data_sampling",
        "DATA_SAMPLING_ENABLED": "enabled",
        "DATA_SAMPLING_NUM_WORKERS": "num_workers",
        "RANDOM_LTD": "random_ltd",
        "RANDOM_LTD_ENABLED": "enabled",
        "RANDOM_LTD_GLOBAL_BATCH_SIZE": "global_batch_size",
        "RANDOM_LTD_LAYER_ID": "random_ltd_layer_id",
        "RANDOM_LTD_LAYER_NUM": "random_ltd_layer_num",
        "RANDOM_LTD_LAYER_TOKEN_LR_ENABLED": "enabled",
        "RANDOM_LTD_LAYER_TOKEN_LR_SCHEDULE": "layer_token_lr_schedule",
        "RANDOM_LTD_MICRO_BATCH_SIZE": "micro_batch_size",
    },
}


@cache
def _modules() -> frozenset[str]:
    named = {*_CLASSES, *_FUNCTIONS, *_CONSTANTS} - {""}
    return frozenset(
        module.rsplit(".", count)[0] for module in named for count in range(module.count(".") + 1)
    )


def is_module(path: str) -> bool:
    """Whether a path below `deepspeed` is a module with such names, or leads to one."""
    return path in _modules()


def kind(path: str) -> str | None:
    """What a dotted path below `deepspeed` is here: "constant", "function", "class", "torch module"; None: nothing."""
    module, _, name = path.rpartition(".")
    classes = _CLASSES.get(module, "").split()
    found = {
        "constant": name in _CONSTANTS.get(module, {}),
        "function": name in _FUNCTIONS.get(module, "").split(),
        "class": name in classes,
        "torch module": f"{name}+" in classes,
    }
    return next((kind for kind, there in found.items() if there), None)


@cache
def get(path: str) -> Any:
    """What stands for a dotted path below `deepspeed`; None where nothing does. The same object at each call."""
    module, _, name = path.rpartition(".")
    match kind(path):
        case "constant":
            return _CONSTANTS[module][name]
        case "function":
            return _function(path)
        case "class":
            return refused_class(path)
        case "torch module":
            return refused_class(path, importlib.import_module("torch.nn").Module)
    return None


def _explained(path: str) -> tuple[str, str]:
    """The feature, and what to do instead."""
    entry = find(path)
    assert entry is not None, path
    return f"{path} ({entry.feature})", entry.instead


def _function(path: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedYetError(*_explained(path))

    module, _, refuse.__name__ = f"xtrain.{path}".rpartition(".")
    refuse.__module__, refuse.__doc__ = module, f"Not there yet: {_explained(path)[1]}."
    return refuse


def refusing_class(name: str, module: str, feature: str, instead: str, base: type = object) -> Any:
    """A class whose constructor raises NotImplementedYetError(feature, instead)."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedYetError(feature, instead)

    return type(
        name, (base,), {"__init__": __init__, "__module__": module, "__doc__": f"Not there yet: {instead}."}
    )


def refused_class(path: str, base: type = object) -> Any:
    """A class whose constructor explains that it is not there. It can be derived from, and asked for by isinstance.

    Args:
        path: its dotted path below `deepspeed`, which the table in missing.py must cover.
        base: what DeepSpeed's class derives from.
    """
    module, _, name = f"xtrain.{path}".rpartition(".")
    return refusing_class(name, module, *_explained(path), base)
