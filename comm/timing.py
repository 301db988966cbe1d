"""Latency and bandwidth of operations, when the communication log is on. Bytes are counted in ledger.py, always.

An operation takes from its call to the end of its wait. One that overlaps with other work is charged with
that work too, so its bandwidth is at least what is shown; xtrain.comm never makes an operation wait that would
not, because ranks may interleave the operations of different groups differently.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import torch.distributed as dist

from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist

Records = dict[str, dict[int, list[Any]]]
"""log name -> message bytes -> [count, latencies in ms, algorithmic and bus bandwidths in Gbit/s]."""

_ALIASES = {
    "reduce_scatter_tensor": "reduce_scatter",
    "all_gather_into_tensor": "all_gather",
    "all_to_all_single": "all_to_all",
}
"""Functions whose operation has a shorter name in the ledger."""


def bandwidths(operation: str, message_bytes: int, ranks: int, milliseconds: float) -> tuple[float, float]:
    """(algorithmic, bus) bandwidth in Gbit/s, by the formulas of DeepSpeed's communication log and of nccl-tests.

    With S message bytes, n ranks and t seconds: S/t and S/t, except 2S/t and 2(n-1)/n S/t for all_reduce, and S/t
    and (n-1)/n S/t for all_gather, reduce_scatter (S: the full message, n times one rank's part) and all_to_all.
    """
    rate = message_bytes * 8 / 1e6 / milliseconds if milliseconds > 0 else 0.0
    operation = _ALIASES.get(operation, operation)
    if operation == "all_reduce":
        return 2 * rate, 2 * rate * (ranks - 1) / ranks
    if operation in ("all_gather", "reduce_scatter", "all_to_all"):
        return rate, rate * (ranks - 1) / ranks
    return rate, rate


def size_text(size: int) -> str:
    """A number of bytes for people, in powers of 1024."""
    if not size:
        return "0B"
    power = min((size.bit_length() - 1) // 10, 8)
    unit = ("B", "KB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB")[power]
    return f"{round(size / 1024**power, 2)} {unit}"


def trimmed(values: list[float]) -> float:
    """Mean without the tenth of the smallest and of the largest."""
    cut = round(len(values) * 0.1)
    kept = sorted(values)[cut : len(values) - cut]
    return sum(kept) / len(kept) if kept else 0.0


def _caller() -> str:
    """Name of the function outside of xtrain.comm that asked for the running operation."""
    frame: Any = sys._getframe(1)
    while frame is not None and str(frame.f_globals.get("__name__", "")).startswith("xtrain.comm"):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_name


class Running:
    """An operation whose time runs."""

    def __init__(self, logger: CommsLogger, operation: str, name: str, size: int, ranks: int) -> None:
        self._logger, self._operation, self._name = logger, operation, name
        self._size, self._ranks = size, ranks
        self._ended = False
        logger.synchronize()
        self._start = time.perf_counter()

    def stop(self) -> None:
        """It has ended; a second call does nothing."""
        if self._ended:
            return
        self._ended = True
        self._logger.synchronize()
        latency = 1000 * (time.perf_counter() - self._start)
        self._logger.append(self._operation, self._name, latency, self._size, self._ranks)


class TimedWork:
    """A torch.distributed.Work whose first `wait` stops the clock."""

    def __init__(self, work: Any, running: Running) -> None:
        self._work, self._running = work, running

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for the operation."""
        result = self._work.wait(*args, **kwargs)
        self._running.stop()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def finish(running: Running | None, work: Any) -> Any:
    """What a communication function returns: `work`, whose end stops the clock. None: it has ended, or not timed."""
    if running is None:
        return work
    if work is None or not hasattr(work, "wait"):
        running.stop()
        return work
    return TimedWork(work, running)


class CommsLogger:
    """Collects the latencies of this process's operations; see `configure` for its switches."""

    def __init__(self) -> None:
        self.enabled = False
        self.verbose = False
        self.prof_all = True
        self.prof_ops: list[str] = []
        self.debug = False
        self.synchronize: Callable[[], None] = lambda: None
        """Waits for the device; an engine puts its backend's here."""
        self.comms_dict: Records = {}

    def begin(
        self,
        operation: str,
        size: int,
        ranks: int,
        log_name: str | None,
        prof: bool,
        caller: str | None = None,
    ) -> Running | None:
        """Start the clock of one operation, if it is to be timed. Called only while `enabled`."""
        name = log_name or operation
        if not (prof or self.prof_all or name in {_ALIASES.get(op, op) for op in self.prof_ops}):
            return None
        shown = f"{name} | [Caller Func: {caller or _caller()}]" if self.debug else name
        return Running(self, operation, shown, size, ranks)

    def append(
        self, raw_name: str, record_name: str, latency: float, msg_size: int, ranks: int | None = None
    ) -> None:
        """Add one operation.

        Args:
            raw_name: the operation, which says what the formulas are.
            record_name: under which name it is summed up.
            latency: in milliseconds.
            msg_size: bytes of the full message.
            ranks: of its group; None: all.
        """
        ranks = ranks or (dist.get_world_size() if dist.is_initialized() else 1)
        algorithmic, bus = bandwidths(raw_name, msg_size, ranks, latency)
        entry = self.comms_dict.setdefault(record_name, {}).setdefault(msg_size, [0, [], [], []])
        entry[0] += 1
        for values, value in zip(entry[1:], (latency, algorithmic, bus), strict=True):
            values.append(value)
        if self.verbose:
            log_dist(
                f"comm op: {record_name} | time (ms): {latency:.2f} | msg size: {size_text(msg_size)} | "
                f"algbw (Gbps): {algorithmic:.2f} | busbw (Gbps): {bus:.2f}",
                ranks=[0],
            )

    def start_profiling_comms(self) -> None:
        """Time every operation from now on."""
        self.prof_all = True

    def stop_profiling_comms(self) -> None:
        """Time only the operations in `prof_ops` from now on."""
        self.prof_all = False

    def start_profiling_op(self, op_name_list: list[str]) -> None:
        """Time these operations, too."""
        self.prof_ops = sorted({*self.prof_ops, *op_name_list})

    def stop_profiling_op(self, op_name_list: list[str]) -> None:
        """Undo `start_profiling_op`."""
        self.prof_ops = [op for op in self.prof_ops if op not in op_name_list]

    def has_data(self) -> bool:
        """Whether any operation was timed."""
        return bool(self.comms_dict)

    def get_raw_data(self) -> Records:
        """Everything that was collected."""
        return dict(self.comms_dict)

    def get_operation_names(self) -> list[str]:
        """The names under which operations were summed up."""
        return list(self.comms_dict)

    def get_total_operations(self) -> int:
        """How many operations were timed."""
        return sum(entry[0] for sizes in self.comms_dict.values() for entry in sizes.values())

    def reset_data(self) -> None:
        """Forget everything."""
        self.comms_dict.clear()

    def get_operation_summary(self, operation_name: str) -> dict[int, dict[str, Any]] | None:
        """By message size: count, latencies in ms and bandwidths in Gbit/s; None for a name without operations."""
        if operation_name not in self.comms_dict:
            return None
        return {
            size: {
                "count": count,
                "total_latency_ms": sum(latencies),
                "avg_latency_ms": trimmed(latencies),
                "tput_avg_gbps": trimmed(algorithmic),
                "busbw_avg_gbps": trimmed(bus),
                "msg_size_bytes": size,
                "msg_size_str": size_text(size),
            }
            for size, (count, latencies, algorithmic, bus) in sorted(self.comms_dict[operation_name].items())
        }

    def stragglers(self) -> dict[str, dict[int, dict[str, Any]]]:
        """How long operations took on the fastest rank, and how much longer here; a collective of all ranks.

        The rank that comes last to an operation waits least, so the smallest latency is the operation's own and
        the rest is waiting for others. Operations that the ranks did not do equally often are left out. The
        exchange itself is neither counted nor timed.
        """
        mine = {
            (name, size): entry[1] for name, sizes in self.comms_dict.items() for size, entry in sizes.items()
        }
        everyone: list[dict[tuple[str, int], list[float]]] = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [{}] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for (name, size), latencies in sorted(mine.items()):
            others = [theirs.get((name, size), []) for theirs in everyone]
            if any(len(other) != len(latencies) for other in others):
                continue
            least = [min(at_once) for at_once in zip(*others, strict=True)]
            lost = [own - fastest for own, fastest in zip(latencies, least, strict=True)]
            found.setdefault(name, {})[size] = {
                "count": len(latencies),
                "total_comm_lat_ms": sum(least),
                "total_straggler_ms": sum(lost),
                "avg_comm_lat_ms": trimmed(least),
                "avg_straggler_ms": trimmed(lost),
                "msg_size_bytes": size,
                "msg_size_str": size_text(size),
            }
        return found

    def log_all(
        self, print_log: bool = True, show_straggler: bool = False, return_dict: bool = False
    ) -> dict[str, Any] | None:
        """Log the tables on rank 0, and return them on request.

        Args:
            show_straggler: with `stragglers()`; all ranks must call.

        Returns:
            With `return_dict`: `summary` (name -> `get_operation_summary`), `straggler_analysis`, `metadata`.
        """
        summary = {name: self.get_operation_summary(name) or {} for name in self.get_operation_names()}
        stragglers = self.stragglers() if show_straggler else None
        if print_log and summary:
            log_dist("latency and bandwidth (rank 0)\n" + _table(summary, _COLUMNS), ranks=[0])
        if print_log and stragglers is not None:
            log_dist("breakdown with straggler effect (rank 0)\n" + _table(stragglers, _LOST), ranks=[0])
        if not return_dict:
            return None
        up = dist.is_initialized()
        return {
            "summary": summary,
            "straggler_analysis": stragglers,
            "metadata": {
                "world_size": dist.get_world_size() if up else 1,
                "rank": dist.get_rank() if up else 0,
                "timestamp": datetime.now().isoformat(),
            },
        }


_COLUMNS = {
    "count": "Count",
    "total_latency_ms": "Total Latency(ms)",
    "avg_latency_ms": "Avg Latency(ms)",
    "tput_avg_gbps": "tput_avg (Gbps)",
    "busbw_avg_gbps": "busbw_avg (Gbps)",
}
_LOST = {
    "count": "Count",
    "total_comm_lat_ms": "Total comm lat(ms)",
    "total_straggler_ms": "Total straggler(ms)",
    "avg_comm_lat_ms": "Avg comm lat(ms)",
    "avg_straggler_ms": "Avg straggler(ms)",
}


def _table(found: dict[str, dict[int, dict[str, Any]]], columns: dict[str, str]) -> str:
    lines = [f"{'Comm. Op':<20}{'Message Size':<20}" + "".join(f"{title:<20}" for title in columns.values())]
    for name, sizes in found.items():
        lines.append(name)
        for row in sizes.values():
            shown = (row[key] if key == "count" else f"{row[key]:.2f}" for key in columns)
            lines.append(f"{'':<20}{row['msg_size_str']:<20}" + "".join(f"{value:<20}" for value in shown))
    return "\n".join(line.rstrip() for line in lines)


comms_logger = CommsLogger()
"""The communication log of this process."""


def configure(
    deepspeed_config: Any = None,
    enabled: bool | None = None,
    prof_all: bool | None = None,
    prof_ops: list[str] | None = None,
    verbose: bool | None = None,
    debug: bool | None = None,
) -> None:
    """Set up the communication log, as `deepspeed.comm.configure` does; what is None stays as it is.

    Args:
        deepspeed_config: a `DeepSpeedConfig` whose `comms_logger` section is taken when that is enabled.
        enabled: time operations.
        prof_all: all of them; else those in `prof_ops` and those called with `prof=True`.
        prof_ops: functions of this module, or `log_name`s.
        verbose: log each one.
        debug: sum operations up by the function that called them.
    """
    if deepspeed_config is not None:
        section = getattr(getattr(deepspeed_config, "comms_config", None), "comms_logger", None)
        if section is None:
            raise ConfigError(
                f"comm.configure() takes a DeepSpeedConfig, not {type(deepspeed_config).__name__}: or pass enabled=True"
            )
        if section.enabled:
            for name in ("enabled", "prof_all", "prof_ops", "verbose", "debug"):
                setattr(comms_logger, name, getattr(section, name))
    given = {
        "enabled": enabled,
        "prof_all": prof_all,
        "prof_ops": prof_ops,
        "verbose": verbose,
        "debug": debug,
    }
    for name, value in given.items():
        if value is not None:
            setattr(comms_logger, name, value)
