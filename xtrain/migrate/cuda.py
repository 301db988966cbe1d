"""Verdicts about CUDA: torch's names, device strings, variables, kernels and libraries that need it.

They are about the other backends. On NVIDIA's all of it works as is.
"""

from __future__ import annotations

from xtrain.migrate.verdict import Answer, Verdict
from xtrain.shims.cuda_names import REFUSED

_HARMLESS = {
    "torch.cuda": "",
    "torch.cuda.is_available": "",
    "torch.cuda.manual_seed": "without CUDA it waits for a device that never comes, and changes nothing",
    "torch.cuda.manual_seed_all": "without CUDA it waits for a device that never comes, and changes nothing",
    "torch.cuda.empty_cache": "it does nothing before CUDA is used",
    "Tensor.is_cuda": "",
}


def cuda_verdict(name: str) -> Answer:
    """About `torch.cuda.X`, `torch.backends...`, `Tensor.cuda`, a device string such as `"cuda:0"`, or `"nccl"`."""
    if name in _HARMLESS:
        return Verdict.AS_IS, _HARMLESS[name]
    if name.startswith(("torch.backends.cudnn", "torch.backends.cuda")):
        return Verdict.AS_IS, "a setting of NVIDIA's libraries: it has no effect elsewhere"
    # The second part, too: torch.cuda.memory.MemPool is torch.cuda.MemPool.
    parts = name.removeprefix("torch.cuda.").split(".")[:2] if name.startswith("torch.cuda.") else []
    part = next((part for part in parts if part in REFUSED), None)
    if part is not None:
        return Verdict.UNSUPPORTED, REFUSED[part]
    if name == '== "cuda"':
        return Verdict.SHIM, "compared with a device's type: look whether the other branch will do, too"
    return Verdict.SHIM, ""


def environment_verdict(name: str) -> Answer:
    """About an environment variable."""
    if name == "CUDA_VISIBLE_DEVICES":
        return Verdict.SHIM, "it chooses among the backend's devices"
    if name.startswith("NCCL_"):
        return Verdict.AS_IS, "a setting of NCCL: it has no effect elsewhere"
    return Verdict.AS_IS, "a setting of CUDA: it has no effect elsewhere"


def extension_verdict(name: str) -> Answer:
    """About CUDA sources and torch's builder of extensions."""
    if name == "CUDA source":
        return (
            Verdict.UNSUPPORTED,
            "it runs on NVIDIA only: keep a way in PyTorch, and take it where there is no CUDA",
        )
    part = name.rpartition(".")[2]
    if part in ("CUDAExtension", "CUDA_HOME", "CUDNN_HOME", "include_paths", "library_paths"):
        return (
            Verdict.UNSUPPORTED,
            "CUDA kernels are built on NVIDIA only: build them where there is CUDA, and not else",
        )
    if part in ("load", "load_inline"):
        return Verdict.CHANGE, "C++ sources work; build CUDA's only where there is CUDA"
    return Verdict.AS_IS, "it builds C++ everywhere"


_TORCHS = (
    ("cross_entropy", "use torch.nn.functional.cross_entropy"),
    ("bert_padding", "pad with torch.nn.utils.rnn.pad_sequence and a mask"),
    ("rotary", "write rotary embeddings in PyTorch"),
    ("SwiGLU", "write it with torch.nn.functional.silu"),
)
"""Parts of the libraries below that are no attention."""
_SDPA = 'use torch.nn.functional.scaled_dot_product_attention (Transformers: attn_implementation="sdpa")'
_LIBRARIES = {
    "flash_attn": _SDPA,
    "flash_attn_interface": _SDPA,
    "flash_attn_2_cuda": _SDPA,
    "xformers": _SDPA,
    "transformer_engine": "use torch.nn's layers, and bf16 in the config",
    "bitsandbytes": "use an optimizer of torch or xtrain, and load the model in bf16",
    "pynvml": "use deepspeed.accelerator.get_accelerator() for memory; keep what is NVIDIA's optional",
    "nvidia_smi": "use deepspeed.accelerator.get_accelerator() for memory; keep what is NVIDIA's optional",
    "triton": "keep a way in PyTorch, and take it where Triton knows no device",
    "cupy": "use torch or numpy",
    "pycuda": "use torch",
    "fused_layer_norm_cuda": "use apex.normalization, which is there",
    "fused_dense_cuda": "use apex.fused_dense, which is there",
    "syncbn": "use apex.parallel.SyncBatchNorm, which is there",
}


def library_verdict(name: str) -> Answer:
    """About a library that needs CUDA, or one that uses DeepSpeed itself."""
    root = name.partition(".")[0]
    if "deepspeed" in name.partition(".")[2].lower() and root not in _LIBRARIES:
        return Verdict.SHIM, f"{root} imports deepspeed, which is xtrain then"
    part = next((text for word, text in _TORCHS if word in name), None)
    return Verdict.UNSUPPORTED, f"{root} needs CUDA: {part or _LIBRARIES.get(root, 'keep a way in PyTorch')}"
