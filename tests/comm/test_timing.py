"""The communication log next to DeepSpeed's formulas, and next to the ledger, which must not notice it."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import xtrain
from tests import training
from xtrain import comm
from xtrain.base.errors import ConfigError
from xtrain.comm.timing import CommsLogger, bandwidths, size_text

OPERATIONS = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast",
              "reduce", "send", "recv")  # fmt: skip


@contextmanager
def _logging(**switches: Any) -> Any:
    """The log of this process, on, and as it was afterwards."""
    comm.configure(enabled=True, **switches)
    try:
        yield comm.comms_logger
    finally:
        comm.comms_logger.__init__()  # type: ignore[misc]


@pytest.mark.deepspeed
@settings(deadline=None)  # the first example imports DeepSpeed
@given(st.sampled_from(OPERATIONS), st.integers(1, 10**10), st.integers(1, 512), st.floats(1e-3, 1e5))
def test_bandwidths_are_deepspeeds(operation: str, size: int, ranks: int, milliseconds: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        theirs = pytest.importorskip("deepspeed.utils.comms_logging", reason="needs the extra deepspeed")
        patch.setattr("deepspeed.comm.get_world_size", lambda *_: ranks)
        expected = theirs.calc_bw_log(operation, size, milliseconds)
        # DeepSpeed takes one rank's part of these and multiplies it; xtrain's message is the whole.
        whole = size * ranks if "gather" in operation or "scatter" in operation else size
        assert bandwidths(operation, whole, ranks, milliseconds) == pytest.approx(expected)
        assert size_text(size) == theirs.convert_size(size)


def test_bandwidths_by_hand() -> None:
    # 1 GB in 100 ms over 4 ranks: 80 Gbit/s.
    assert bandwidths("all_reduce", 10**9, 4, 100) == pytest.approx((160, 120))
    assert bandwidths("all_gather", 10**9, 4, 100) == pytest.approx((80, 60))
    assert bandwidths("broadcast", 10**9, 4, 100) == pytest.approx((80, 80))
    assert bandwidths("barrier", 0, 4, 0.0) == (0, 0)
    assert (size_text(0), size_text(1536)) == ("0B", "1.5 KB")


def _operations() -> dict[str, Any]:
    n, rank = comm.get_world_size(), comm.get_rank()
    with _logging() as log:
        data = torch.ones(1000)
        comm.all_reduce(data)
        comm.all_reduce(data, log_name="mine")
        work = comm.all_reduce(data, async_op=True)
        early = log.get_total_operations()
        work.wait()
        work.wait()
        assert work.is_completed()
        comm.all_gather_into_tensor(torch.empty(n * 1000), data)
        comm.SliceSum(torch.ones(n * 100), None).wait()
        comm.SliceGather(torch.ones(n * 100), torch.ones(100), None).wait()
        comm.broadcast(data, 0)
        comm.reduce(data, 0)
        comm.all_to_all_single(torch.empty(n * 10), torch.ones(n * 10))
        comm.all_gather([torch.empty(1000) for _ in range(n)], data)
        comm.reduce_scatter_tensor(torch.empty(5), torch.ones(5 * n))
        if rank == 0:
            comm.send(data, 1)
        if rank == 1:
            assert comm.recv(data, 0) == 0
        comm.all_gather_object([None] * n, rank)
        comm.broadcast_object_list([rank], 0)
        comm.barrier()
        assert comm.get_comm_operation_count() == log.get_total_operations()
        found = comm.log_summary(return_dict=True)
        assert found is not None
        assert found["metadata"]["rank"] == rank
        assert found["straggler_analysis"] is None
        assert sorted(comm.get_logged_comm_ops()) == sorted(found["summary"])
        comm.reset_log()
        assert not comm.has_comm_data()
        return {"early": early, "summary": found["summary"]}


def test_every_operation_is_timed(ranks: Any) -> None:
    n = 3
    for rank, got in enumerate(ranks(n, _operations)):
        assert got["early"] == 2  # the third is still running
        counts = {
            (name, size): row["count"]
            for name, sizes in got["summary"].items()
            for size, row in sizes.items()
        }
        objects = {key: value for key, value in counts.items() if "object" in key[0]}
        assert len(objects) == 2
        expected = {
            ("all_reduce", 4000): 2, ("mine", 4000): 1, ("all_gather", n * 4000): 2, ("reduce_scatter", n * 400): 1,
            ("all_gather", n * 400): 1, ("broadcast", 4000): 1, ("reduce", 4000): 1, ("all_to_all", n * 40): 1,
            ("reduce_scatter", n * 20): 1, ("barrier", 0): 1,
        }  # fmt: skip
        if rank < 2:
            expected["send" if rank == 0 else "recv", 4000] = 1
        assert {key: value for key, value in counts.items() if key not in objects} == expected
        row = got["summary"]["all_reduce"][4000]
        assert row["msg_size_str"] == "3.91 KB"
        assert row["total_latency_ms"] >= row["avg_latency_ms"] > 0
        # Two values: their means are harmonic and arithmetic, so the product is at least the formula's.
        formula = 2 * 4000 * 8 / 1e6
        assert row["tput_avg_gbps"] * row["avg_latency_ms"] >= formula * 0.999
        assert row["busbw_avg_gbps"] == pytest.approx(row["tput_avg_gbps"] * (n - 1) / n)


def _chosen() -> list[dict[str, int]]:
    data, seen = torch.ones(10), []

    def counts(log: CommsLogger) -> dict[str, int]:
        return {name: sum(e[0] for e in sizes.values()) for name, sizes in log.get_raw_data().items()}

    def talk() -> None:
        comm.all_reduce(data)
        comm.all_reduce(data, log_name="special")
        comm.broadcast(data, 0, prof=True)
        comm.all_gather_into_tensor(torch.empty(20), data)

    for switches in (
        {},
        {"prof_ops": ["all_gather_into_tensor"]},
        {"prof_ops": ["special"]},
        {"debug": True},
    ):
        with _logging(**{"prof_all": "debug" in switches, **switches}) as log:
            talk()
            seen.append(counts(log))
    with _logging() as log:
        log.stop_profiling_comms()
        log.start_profiling_op(["all_reduce"])
        talk()
        log.stop_profiling_op(["all_reduce"])
        log.start_profiling_comms()
        comm.reduce(data, 0)
        seen.append(counts(log))
    comm.all_reduce(data)
    seen.append(counts(comm.comms_logger))
    return seen


def test_operations_can_be_chosen(ranks: Any) -> None:
    for prof, by_function, by_name, by_caller, switched, off in ranks(2, _chosen):
        assert prof == {"broadcast": 1}
        assert by_function == {"broadcast": 1, "all_gather": 1}
        assert by_name == {"broadcast": 1, "special": 1}
        assert by_caller == {
            f"{name} | [Caller Func: talk]": 1
            for name in ("all_reduce", "special", "broadcast", "all_gather")
        }
        assert switched == {"all_reduce": 1, "broadcast": 1, "reduce": 1}
        assert off == {}


def _late() -> dict[str, Any]:
    with _logging() as log:
        comm.barrier(log_name="start")
        if comm.get_rank() == 1:
            time.sleep(0.2)
        comm.all_reduce(torch.ones(10))
        if comm.get_rank() == 0:
            log.append("broadcast", "alone", 1.0, 10)
        before = {key: (e.calls, e.sent_bytes) for key, e in comm.ledger.entries.items()}
        found = comm.log_summary(show_straggler=True, return_dict=True)
        assert before == {key: (e.calls, e.sent_bytes) for key, e in comm.ledger.entries.items()}
        assert found is not None
        return dict(found["straggler_analysis"])


def test_the_rank_that_waits_is_told_how_long(ranks: Any) -> None:
    first, second = ranks(2, _late)
    assert "alone" not in first
    assert first["all_reduce"][40]["total_straggler_ms"] > 150
    assert second["all_reduce"][40]["total_straggler_ms"] < 100
    assert first["all_reduce"][40]["total_comm_lat_ms"] == second["all_reduce"][40]["total_comm_lat_ms"]


def _ledger(stage: int, section: dict[str, Any]) -> tuple[dict[Any, Any], list[float], int]:
    config = training.config(stage, 4, zero_optimization=training.zero(stage, 0), comms_logger=section)
    with _logging() as log:
        log.enabled = False  # the config alone turns it on
        engine = xtrain.initialize(model=training.build_model(), config=config)[0]
        losses = [training.engine_step(engine, step) for step in range(3)]
        # Sizes of pickled objects and group names differ between two engines.
        entries = {
            name: (entry.calls, entry.message_bytes, entry.sent_bytes)
            for (name, group), entry in comm.ledger.entries.items()
            if group != "world" or name == "all_reduce"
        }
        return entries, losses, log.get_total_operations()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_and_curves_do_not_notice(ranks: Any, stage: int) -> None:
    off, on = ranks(2, _ledger, stage, {}), ranks(2, _ledger, stage, {"enabled": True})
    for (entries, losses, none), (timed_entries, timed_losses, many) in zip(off, on, strict=True):
        assert entries == timed_entries
        assert losses == timed_losses
        assert none == 0
        assert many > 3


def test_a_log_that_never_was_cannot_name_stragglers() -> None:
    with pytest.raises(ConfigError, match=r"needs timings: set comms_logger\.enabled"):
        comm.log_summary(show_straggler=True)


def test_configuring(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="xtrain")
    with _logging():
        comm.configure(xtrain.DeepSpeedConfig({"train_batch_size": 1}))
        assert comm.comms_logger.verbose is False
        section = {"enabled": True, "verbose": True, "prof_all": False, "prof_ops": ["x"], "debug": True}
        comm.configure(xtrain.DeepSpeedConfig({"train_batch_size": 1, "comms_logger": section}))
        assert all(getattr(comm.comms_logger, name) == value for name, value in section.items())
        comm.comms_logger.append("all_reduce", "x", 2.0, 10**6, 2)
        comm.log_summary()
        with pytest.raises(ConfigError, match="takes a DeepSpeedConfig, not dict"):
            comm.configure({})
    assert any("comm op: x | time (ms): 2.00 | msg size: 976.56 KB" in line for line in caplog.messages)
    assert any("busbw_avg (Gbps)" in line and "976.56 KB" in line for line in caplog.messages)
    assert dist.is_initialized() is False
