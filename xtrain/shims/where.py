"""An error of xtrain's that nobody catches names the line in the user's script, without a traceback."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from xtrain.base.errors import XtrainError

_CUDA_LIBRARIES = ("libcuda", "libcudart", "libcublas", "libcudnn", "libnccl", "libc10_cuda", "libtorch_cuda")


def user_line(trace: TracebackType | None) -> str | None:
    """`file:line` of the innermost frame that is neither xtrain's nor an installed package's."""
    import sysconfig  # not at Python's start

    folders = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    libraries = tuple(f"{folder}{os.sep}" for folder in (*folders, Path(__file__).absolute().parents[1]))
    found = None
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(libraries) and not file.startswith("<"):
            found = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, XtrainError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return (
            "Triton is not installed, and its kernels do not run on this backend: install the package triton for a "
            "script that only imports it (a kernel that is launched is refused), or take the import out"
        )
    if isinstance(error, ImportError) and any(library in str(error) for library in _CUDA_LIBRARIES):
        return f"a compiled CUDA extension cannot be loaded here ({error}): use the script's own fallback, or torch"
    return None


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook."""
    line, sentence = user_line(trace), _sentence(error)
    if line is None or sentence is None:
        _before(kind, error, trace)
    else:
        print(f"{line}: error: {sentence}", file=sys.stderr)


_before: Any = sys.__excepthook__


def install() -> None:
    """Report so from now on."""
    global _before
    if sys.excepthook is not report:
        _before, sys.excepthook = sys.excepthook, report


def uninstall() -> None:
    """Report as before."""
    if sys.excepthook is report:
        sys.excepthook = _before
