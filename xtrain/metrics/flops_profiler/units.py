"""Large and small numbers as text, as DeepSpeed's profiler writes them."""

from __future__ import annotations

_MAGNITUDES = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    """`1234` as "1.23 K".

    Args:
        units: T, G, M, K, m or u; None: the one that fits, anything else: none.
        precision: digits after the point.
    """
    if units is None:
        fitting = (unit for unit, size in _MAGNITUDES.items() if abs(num) >= size)
        units = "" if num == 0 else next(fitting, "u")
    return f"{round(num / _MAGNITUDES.get(units, 1.0), precision):g} {units}"


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    """Floating-point operations per second."""
    return f"{number_to_string(flops, units, precision)}FLOPS"


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    """Multiply-accumulate operations."""
    return f"{number_to_string(macs, units, precision)}MACs"


def bytes_to_string(b: float, units: str | None = None, precision: int = 2) -> str:
    """Bytes, in powers of 1000."""
    return f"{number_to_string(b, units, precision)}B"


def params_to_string(params_num: float, units: str | None = None, precision: int = 2) -> str:
    """Parameters, where a billion is B."""
    wanted = units.replace("B", "G") if units else units
    return number_to_string(params_num, wanted, precision).replace("G", "B").strip()


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    """Seconds."""
    return f"{number_to_string(duration, units, precision)}s"
