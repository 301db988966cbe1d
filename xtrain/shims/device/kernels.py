"""CUDA kernels that a script brings: source to compile, Triton. They cannot run on the host and are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from xtrain.base.errors import NotImplementedYetError
from xtrain.shims.patches import Patches

_INSTEAD = "write it in torch for this backend, or take the script's own fallback"


def _cuda_sources(sources: Iterable[Any] | str | None) -> list[str]:
    listed = [sources] if isinstance(sources, str) else list(sources or [])
    return [str(source) for source in listed if str(source).endswith((".cu", ".cuh"))]


def refuse_sources(cpp_extension: ModuleType, patches: Patches) -> None:
    """torch.utils.cpp_extension: what is C++ only goes on being built."""

    def guarded(name: str) -> Callable[..., Any]:
        build = getattr(cpp_extension, name)

        def checked(extension: str, sources: Any = None, *args: Any, **kwargs: Any) -> Any:
            found = _cuda_sources(sources)
            if found:
                raise NotImplementedYetError(f"the CUDA kernel {extension} ({', '.join(found)})", _INSTEAD)
            return build(extension, sources, *args, **kwargs)

        return checked

    inline = cpp_extension.load_inline

    def load_inline(name: str, cpp_sources: Any, cuda_sources: Any = None, *args: Any, **kwargs: Any) -> Any:
        if cuda_sources:
            raise NotImplementedYetError(f"the CUDA kernel {name} (source in the script)", _INSTEAD)
        return inline(name, cpp_sources, None, *args, **kwargs)

    def cuda_extension(name: str, sources: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedYetError(
            f"the CUDA extension {name}", "build it where CUDA is, or take CppExtension for what is C++ only"
        )

    patches.set(cpp_extension, "load", guarded("load"))
    patches.set(cpp_extension, "load_inline", load_inline)
    patches.set(cpp_extension, "CUDAExtension", cuda_extension)


def refuse_triton(jit: ModuleType, patches: Patches) -> None:
    """triton.runtime.jit: a kernel's launch. Triton's interpreter (TRITON_INTERPRET=1) has another class for them."""

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(self, "__name__", None) or getattr(self.fn, "__name__", "?")
        raise NotImplementedYetError(f"the Triton kernel {name} on this backend", _INSTEAD)

    patches.set(jit.JITFunction, "run", run)
