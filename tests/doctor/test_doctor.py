"""`xtrain doctor` on this host, and with backends that hang, die, count wrongly or do not answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.comm.test_mpi import MPIEXEC, needs_mpi
from xtrain import cli
from xtrain.doctor import probes, report
from xtrain.doctor.follow import Outcome

ROOT = Path(__file__).resolve().parents[2]


def doctor(*arguments: str, site: Path | None = None, by: tuple[str, ...] = (), **env: str) -> Any:
    """(exit status, report or None, standard error)."""
    places = [str(place) for place in (site, ROOT, os.environ.get("PYTHONPATH")) if place]
    start = by or (sys.executable,)
    done = subprocess.run(
        [*start, "-m", "xtrain.cli", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), **env},
    )
    shown = json.loads(done.stdout) if "--json" in arguments and done.stdout else done.stdout
    return done.returncode, shown, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the misbehaving backends as an installed package; only those that are asked for are offered."""

    def offering(*names: str) -> Path:
        folder = tmp_path_factory.mktemp("site")
        shutil.copy(Path(__file__).with_name("broken_backend.py"), folder)
        info = folder / "broken_backend-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-backend\nVersion: 0.1\n")
        lines = [f"{name} = broken_backend:{name.capitalize()}" for name in names]
        (info / "entry_points.txt").write_text("[xtrain.backends]\n" + "\n".join(lines) + "\n")
        return folder

    return offering


def test_this_host_is_well() -> None:
    status, found, errors = doctor("--json", "--library", "gloo")
    assert status == 0, (found, errors)
    assert found["schema"] == 1
    assert (found["ok"], found["problems"]) == (True, [])
    assert found["selected"] == {"name": "cpu", "by": "detection", "reason": None}
    backends = {entry["name"]: entry for entry in found["backends"]}
    assert backends["cpu"]["dtypes"]["bfloat16"] == "native"
    assert "torch_npu is not installed" in backends["ascend"]["reason"]
    (probe,) = [one for one in found["probes"] if one["backend"] == "cpu"]
    assert (probe["library"], probe["ranks"]) == ("gloo", 2)
    assert list(probe["results"]) == [*probes.WITHOUT_DTYPE, *probes.WITH_DTYPE]
    states = {entry["state"] for row in probe["results"].values() for entry in row.values()}
    assert states <= {"ok", "refused"}
    for collective, row in probe["results"].items():
        for dtype in ("float64", "float32", "bfloat16", "float16", "int64"):
            assert row.get(dtype, {"state": "ok"})["state"] == "ok", (collective, dtype)
    measured = {(entry["operation"], entry["bytes"]) for entry in probe["bandwidth"]}
    assert {("memory copy", 2**26), ("all_reduce", 2**24), ("all_gather", 2**16)} <= measured
    assert all(entry["bytes_per_second"] > 0 for entry in probe["bandwidth"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "hanging",
            "hangs: nothing has happened for 6 s, with rank 1 in taking the device of backend hanging, rank 0 ",
        ),
        ("dying", "rank 1 was killed by SIGKILL in taking the device of backend dying"),
    ],
)
def test_a_rank_that_hangs_or_dies_is_named(site: Any, name: str, sentence: str) -> None:
    status, found, _ = doctor("--json", "--quick", "--backend", name, "--timeout", "6", site=site(name))
    assert status == 1
    (problem,) = found["problems"]
    assert problem.startswith(f"backend {name}, library gloo: {sentence}")
    entry = next(one for one in found["backends"] if one["name"] == name)
    assert entry["source"] == "broken-backend 0.1"
    assert (
        any(one["backend"] == "cpu" and one["ok"] for one in found["probes"]) is False
    )  # the pair was tried once


def test_wrong_sums_and_missing_dtypes_are_named(site: Any) -> None:
    status, found, _ = doctor("--json", "--quick", "--backend", "wrong", site=site("wrong"))
    assert status == 1
    problems = " | ".join(found["problems"])
    assert (
        "backend wrong, library gloo: all_reduce sum of float32 gives wrong results on rank 1: "
        "element 3 is 2.0, expected 1.0" in problems
    )
    assert (
        "all_reduce sum of bfloat16 is refused, and training needs it: RuntimeError: bfloat16 is not"
        in problems
    )
    assert "broadcast" not in problems


@pytest.mark.parametrize(
    ("how", "sentence"),
    [("hangs", "has no answer within 8 s"), ("dies", "ends the process: was killed by SIGABRT")],
)
def test_a_driver_that_does_not_answer_is_told_and_the_rest_goes_on(
    site: Any, how: str, sentence: str
) -> None:
    arguments = ["--json", "--quick", "--ranks", "1", "--timeout", "8", "--backend", "cpu"]
    status, found, _ = doctor(*arguments, site=site("silent"), SILENT_DRIVER=how)
    assert status == 0, found
    (entry,) = [one for one in found["backends"] if one["name"] == "silent"]
    assert not entry["available"]
    assert entry["reason"] == f"asking it whether it is there {sentence}"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cuad", "unknown backend 'cuad': did you mean 'cuda'?"),
        ("ascend", "backend 'ascend' cannot be used here: torch_npu is not installed"),
    ],
)
def test_an_absent_backend_is_one_sentence_after_the_rest(name: str, sentence: str) -> None:
    status, shown, errors = doctor("--quick", "--backend", name, "--ranks", "1")
    assert status == 1
    assert f"xtrain: error: {sentence}" in shown
    assert "process-group libraries: gloo" in shown
    assert "backend cpu, library gloo, 1 ranks" in shown
    assert "Traceback" not in shown + errors


def test_under_torchrun_rank_0_reports_for_all() -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    status, found, errors = doctor("--json", "--quick", by=torchrun)
    assert status == 0, errors
    (probe,) = found["probes"]
    assert (probe["backend"], probe["library"], probe["ranks"], probe["ok"]) == ("cpu", "gloo", 2, True)


@needs_mpi
@pytest.mark.mpi
def test_under_mpiexec_and_by_itself_with_mpi() -> None:
    for by in ((str(MPIEXEC), "-n", "2", sys.executable), ()):
        status, found, errors = doctor("--json", "--quick", "--backend", "sunway", "--library", "mpi", by=by)
        assert status == 0, errors
        probe = next(one for one in found["probes"] if one["backend"] == "sunway")
        assert (probe["library"], probe["ranks"], probe["ok"]) == ("mpi", 2, True)


def test_mistakes_in_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--ranks", "0"]) == 2
    assert cli.main(["doctor", "--timeout", "-1"]) == 2
    errors = capsys.readouterr().err
    assert "--ranks 0: at least one rank is needed" in errors
    assert "--timeout -1: it must be a positive number" in errors


def _at_several_sizes() -> list[str]:
    """The probes themselves on this rank: what goes wrong in any of them."""
    from xtrain import comm

    at = probes.Place(comm.get_rank(), comm.get_world_size(), torch.device("cpu"))
    wrong = []
    for name, dtype, action in probes.run(at):
        try:
            action()
        except probes.Wrong as error:
            wrong.append(f"{name} of {dtype}: {error}")
        except RuntimeError:
            continue  # gloo lacks it
    return wrong


@pytest.mark.parametrize("size", [1, 2, 4])
def test_probes_expect_what_gloo_gives(ranks: Any, size: int) -> None:
    assert ranks(size, _at_several_sizes) == [[]] * size


def test_ranks_that_disagree_are_named() -> None:
    def line(state: str, why: str | None = None) -> dict[str, Any]:
        return {"kind": "probe", "name": "broadcast", "dtype": "float32", "state": state, "why": why}

    backend = {"name": "cpu", "dtypes": {"float32": "native", "float16": "absent"}}
    lines = [[line("ok")], [line("wrong", "element 0 is 1, expected 2")], [line("ok")]]
    entry = report.probe_entry(backend, "gloo", 3, Outcome(lines))
    assert entry["problems"] == [
        "backend cpu, library gloo: broadcast of float32 gives wrong results on rank 1: element 0 is 1, expected 2"
    ]
    assert report.needed("broadcast", "float32", ["float32"])
    assert not report.needed("broadcast", "float16", ["float32"])
    assert not report.needed("all_reduce avg", "float32", ["float32"])
