"""What several tests of the launcher share: the undisturbed run, hosts, Slurm."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.runs import SMALL, run
from tests.parity.corpus import write_corpus
from tests.services import hosts as services
from tests.services import slurm
from xtrain.align.record import read_record

STEPS = 100


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a tiny run of two ranks in aligned mode, whose curve is the same on any number of them."""
    corpus = write_corpus(tmp_path_factory.mktemp("text"), 200)
    return [
        *SMALL, f"data.path={corpus}", f"train.steps={STEPS}", "train.save_interval=20", "keep=3",
        "+deepspeed.xtrain.aligned=true", "cluster.ranks_per_node=1", "cluster.restart_delay=0",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """Steps and losses of that run on two ranks of this machine, left alone."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, output = run(run_dir, *settings, "cluster.ranks_per_node=2")
    assert status == 0, output
    return curve(run_dir)


def curve(run_dir: Path) -> list[tuple[int, float]]:
    """Steps and losses of a run's record, in order."""
    return list(read_record(run_dir).losses().items())


@pytest.fixture(scope="session")
def _slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Slurm]:
    if (why := slurm.missing()) is not None:
        pytest.skip(f"no Slurm here: {why}")
    cluster = slurm.Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(_slurm: slurm.Slurm) -> Iterator[slurm.Slurm]:
    """Slurm with two nodes, n1 and n2, and no jobs."""
    yield _slurm
    _slurm.clear()


@pytest.fixture(scope="session")
def _hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.Hosts]:
    if (why := services.missing()) is not None:
        pytest.skip(f"no hosts here: {why}")
    # Two test runs on one machine need different networks.
    found = services.Hosts(tmp_path_factory.mktemp("hosts"), ["a", "b"], net=os.getpid() % 250)
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture
def hosts(_hosts: services.Hosts) -> Iterator[services.Hosts]:
    """Two hosts, a and b, that ssh reaches; as they were at first."""
    for name in _hosts.names:
        _hosts.mend(name)
        _hosts.reboot(name)
    return _hosts
