"""What apex has and the shim does not, and what to use instead: the one table. Imports no torch."""

from __future__ import annotations

ATTENTION = "use torch.nn.functional.scaled_dot_product_attention"
PARALLEL = "use Megatron's own megatron.core, or pass an mpu to deepspeed.initialize"
TORCH = "use torch's own module of that name"

REFUSED: dict[str, tuple[str, str]] = {
    "RNN": ("recurrent networks in 16 bits", "use torch.nn.LSTM, GRU or RNN"),
    "reparameterization": ("weight norm in 16 bits", "use torch.nn.utils.parametrizations.weight_norm"),
    "pyprof": ("profiling", "use torch.profiler"),
    "distributed_testing": ("apex's own tests", "use torch.testing._internal.common_distributed"),
    "parallel.multiproc": (
        "apex's launcher",
        "start the script by xtrain launch, xtrain deepspeed or torchrun",
    ),
    "optimizers.FusedMixedPrecisionLamb": (
        "LAMB with states of mixed dtypes",
        "use FusedLAMB, or the config's optimizer Lamb with fp16 or bf16",
    ),
    "optimizers.FP16_Optimizer": (
        "the optimizer wrapper for fp16",
        'use the config\'s "fp16": {"enabled": true}, or apex.amp.initialize(opt_level="O2")',
    ),
    "fp16_utils.FP16_Optimizer": (
        "the optimizer wrapper for fp16",
        'use the config\'s "fp16": {"enabled": true}, or apex.amp.initialize(opt_level="O2")',
    ),
    "contrib.fmha": ("fused attention", ATTENTION),
    "contrib.multihead_attn": ("fused attention", ATTENTION),
    "contrib.openfold_triton": ("Triton kernels for OpenFold", ATTENTION),
    "contrib.focal_loss": ("fused focal loss", "use torchvision.ops.sigmoid_focal_loss"),
    "contrib.group_norm": ("fused group norm", "use torch.nn.GroupNorm"),
    "contrib.groupbn": ("batch norm over groups of devices", "use apex.parallel.SyncBatchNorm"),
    "contrib.cudnn_gbn": ("batch norm over groups of devices", "use apex.parallel.SyncBatchNorm"),
    "contrib.index_mul_2d": ("fused indexing", "write in1[index] * in2"),
    "contrib.bottleneck": ("fused residual blocks", "write the block in torch.nn"),
    "contrib.conv_bias_relu": ("fused convolutions", "use torch.nn.functional.conv2d and relu"),
    "contrib.peer_memory": ("memory of peer devices", "use torch.distributed"),
    "contrib.nccl_allocator": ("memory registered with NCCL", "leave it out: it changes no numbers"),
    "contrib.gpu_direct_storage": ("storage read by the device", "use torch.save and torch.load"),
    "contrib.optimizers": (
        "optimizers divided over ranks",
        'use the config\'s "zero_optimization": {"stage": 1}, or apex.optimizers',
    ),
    "contrib.sparsity": ("structured sparsity", "use torch.ao.pruning"),
    "contrib.torchsched": ("a scheduler for torch.compile", "use torch.compile"),
    "contrib.transducer": ("transducer joint and loss", "use torchaudio.functional.rnnt_loss"),
    "transformer.amp": ("loss scaling over model-parallel ranks", 'use the config\'s "fp16" with an mpu'),
    "transformer.functional": ("fused softmax and rotary embeddings", ATTENTION),
    "transformer.layers": ("layer norms that know of sequence parallelism", "use apex.normalization"),
    "transformer.microbatches": ("micro-batches of pipelines", "use gradient_accumulation_steps"),
    "transformer.parallel_state": ("model-parallel groups", PARALLEL),
    "transformer.pipeline_parallel": ("pipeline parallelism", PARALLEL),
    "transformer.tensor_parallel": ("tensor parallelism", PARALLEL),
    "transformer.testing": ("apex's own tests", "use Megatron's models"),
    "transformer.log_util": ("apex's logger", "use logging"),
}
"""Dotted path below `apex` -> (feature, what to do instead)."""


def find(path: str) -> tuple[str, str] | None:
    """The entry for a dotted path below `apex`, or for a package that it is in."""
    parts = path.split(".")
    return next(
        (REFUSED[key] for end in range(len(parts), 0, -1) if (key := ".".join(parts[:end])) in REFUSED), None
    )
