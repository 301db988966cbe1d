"""NVIDIA's apex in PyTorch: the same arithmetic on every device, without its kernels.

`xtrain run` lets `import apex` and `import amp_C` mean this package; a script may also import it by its name. What of
apex is not there is refused by name (refused.py). Semantics: https://github.com/NVIDIA/apex, at its state of 2026 for
optimizers, norms and amp_C, and before their removal for amp, parallel and fp16_utils.
"""

from __future__ import annotations

from xtrain.shims.apex import refused

refused.install()

from xtrain.shims.apex import (  # noqa: E402 - the finder comes first
    amp,
    fp16_utils,
    multi_tensor_apply,
    normalization,
    optimizers,
    parallel,
)

__all__ = ["amp", "fp16_utils", "multi_tensor_apply", "normalization", "optimizers", "parallel"]

__getattr__ = refused.attributes(__name__)
