"""Building a model on another device and in another dtype than the default: on `meta`, without memory."""

from __future__ import annotations

from types import TracebackType

import torch


class OnDevice:
    """`with OnDevice(dtype=torch.float16, device="meta"): model = MyModel()`.

    Inside, tensors that are made without a device get `device`, and floating ones that are made without
    a dtype get `dtype`.

    Args:
        dtype: a floating dtype; None leaves it alone.
        device: where; `meta` allocates nothing.
        enabled: False makes this do nothing.
    """

    def __init__(
        self, dtype: torch.dtype | None, device: str | torch.device = "meta", enabled: bool = True
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.enabled = enabled
        self._before: list[torch.dtype] = []

    def __enter__(self) -> OnDevice:
        if self.enabled:
            self._before.append(torch.get_default_dtype())
            if self.dtype is not None:
                torch.set_default_dtype(self.dtype)
            self.device.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.enabled:
            self.device.__exit__(kind, error, traceback)
            torch.set_default_dtype(self._before.pop())
