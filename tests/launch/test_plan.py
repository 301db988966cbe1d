"""What the launcher decides before and between starts of a run: sizes, nodes, memory, hangs, goodput. No processes."""

from __future__ import annotations

import json
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrain.base.errors import ConfigError
from xtrain.config.batch import BatchSizes
from xtrain.launch import hang
from xtrain.launch.checks import address_of_first, what_is_wrong
from xtrain.launch.compose import compose_config
from xtrain.launch.hang import Pulses, frames_of
from xtrain.launch.incidents import Clock, Incident, goodput, last_step, read_incidents, write_incident
from xtrain.launch.job import Job, make_job
from xtrain.launch.membership import Membership
from xtrain.launch.memory import model_states, parameters
from xtrain.launch.nodes import Node, place
from xtrain.launch.survey import digest
from xtrain.version import __version__


def job(*overrides: str) -> Job:
    """Of a run that is not started."""
    config, _ = compose_config(["run_dir=/nowhere/run", *overrides])
    return make_job(config, [])


def on_hosts(*overrides: str) -> Job:
    """Three machines with two ranks each."""
    hosts = [
        "cluster=hosts",
        "cluster.hosts=[a,b,c]",
        "train.micro_batch_size=1",
        "train.global_batch_size=12",
    ]
    return job(*hosts, *overrides)


SOME = on_hosts()


@given(
    micro=st.integers(1, 4), accumulation=st.integers(1, 8), nodes=st.integers(1, 6), slots=st.integers(1, 8),
    lost=st.integers(0, 6), split=st.sampled_from([1, 2, 4]), aligned=st.booleans(),
)  # fmt: skip
def test_the_global_batch_is_kept_on_fewer_nodes(
    micro: int, accumulation: int, nodes: int, slots: int, lost: int, split: int, aligned: bool
) -> None:
    """And with model parallelism the ranks are whole copies; in aligned mode, powers of two where the job's are."""
    ranks = nodes * slots * split
    batch = BatchSizes(micro * accumulation * nodes * slots, micro, accumulation)
    one = replace(
        SOME,
        nodes=[Node(f"n{index}", slots * split) for index in range(nodes)],
        cluster=SOME.cluster.model_copy(update={"model_parallel_size": split}),
        batch=batch,
        deepspeed_config={"xtrain": {"aligned": aligned}},
    )
    assert one.ranks_with(ranks) == ranks
    left = max(0, nodes - lost) * slots * split
    fewer = one.ranks_with(left)
    assert 0 <= fewer <= left
    if fewer == 0:
        assert left < split or left == 0
        return
    config = json.loads(one.config_for(fewer))
    if fewer < ranks:
        assert config["train_batch_size"] == batch.train
        copies, rest = divmod(fewer, split)
        assert rest == 0
        assert (
            config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * copies
            == batch.train
        )
    if aligned and ranks & (ranks - 1) == 0:
        assert fewer & (fewer - 1) == 0


def test_ranks_are_numbered_node_after_node() -> None:
    nodes = [Node("a", 2), Node("b", 2, (4, 6)), Node("c", 2)]
    layout = place(nodes)
    assert [(p.node.name, p.index, p.first_rank, p.ranks) for p in layout.placements] == [
        ("a", 0, 0, 2), ("b", 1, 2, 2), ("c", 2, 4, 2),
    ]  # fmt: skip
    assert layout.node_of(3).name == "b"
    assert [layout.placements[1].device(local) for local in (0, 1)] == [4, 6]
    fewer = place(nodes, 3)
    assert [(p.node.name, p.ranks) for p in fewer.placements] == [("a", 2), ("b", 1)]
    assert fewer.ranks == 3


def test_a_node_that_fails_too_often_is_left_out_where_that_is_possible() -> None:
    members = Membership(on_hosts())
    assert not members.fail(None)
    assert not members.fail("b")
    assert members.fail("b")
    assert [node.name for node in members.usable()] == ["a", "c"]
    layout = members.layout(members.usable())
    assert layout is not None
    assert layout.ranks == 4
    needs_all = Membership(on_hosts("cluster.min_nodes=3"))
    assert not needs_all.fail("b")
    assert not needs_all.fail("b")
    assert len(needs_all.usable()) == 3
    assert needs_all.layout(needs_all.usable()[:2]) is None
    alone = Membership(job())
    assert not alone.fail("localhost")
    assert not alone.fail("localhost")


def _hello(**changes: Any) -> dict[str, Any]:
    found = {
        "python": platform.python_version(), "xtrain": __version__, "torch": metadata.version("torch"),
        "shared": True, "devices": None, "memory": 10**12, "machine": "x", "address": "10.0.0.1",
        "interfaces": {"lo": "127.0.0.1", "ib0": "10.1.0.1"}, "files": {str(SOME.script): digest(str(SOME.script))},
    }  # fmt: skip
    return {**found, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"xtrain": "0.0.1"}, f"xtrain 0.0.1 there, {__version__} here: install the same on every node"),
        ({"torch": None}, "torch is not installed there, "),
        ({"python": "3.9.1"}, "python 3.9 there, "),
        (
            {"shared": False},
            "the run folder /nowhere/run is not there: put it on a file system that all nodes see",
        ),
        ({"files": {str(SOME.script): None}}, f"the script {SOME.script} is not there"),
        ({"files": {str(SOME.script): "0"}}, f"the script {SOME.script} has another content than here"),
        ({"devices": 1}, "it has 1 devices of backend None, and is to have 2 ranks"),
        ({"memory": 10**6}, "2 ranks need "),
    ],
)
def test_a_node_that_does_not_fit(changes: dict[str, Any], said: str) -> None:
    wrong = what_is_wrong(
        SOME, {"a": _hello(machine="a"), "b": _hello(**{"machine": "b", **changes}), "c": _hello()}
    )
    assert list(wrong) == ["b"]
    assert wrong["b"].startswith(f"node b: {said}")


def test_memory_is_counted_for_each_machine_and_device() -> None:
    """Nodes that are one machine share its memory."""
    assert SOME.needs is not None
    together = {name: _hello(memory=5 * SOME.needs) for name in "abc"}
    assert list(what_is_wrong(SOME, together)) == ["c"]
    apart = {name: _hello(memory=5 * SOME.needs, machine=name) for name in "abc"}
    assert what_is_wrong(SOME, apart) == {}
    small = on_hosts("+cluster.device={name: Small, memory_gb: 0.0001}")
    assert "and Small has 0.0001 GB" in what_is_wrong(small, {"a": _hello()})["a"]


@pytest.mark.parametrize("name", ["glm_tiny", "glm_335m"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    import torch

    from xtrain.models.glm import GLM, GLMConfig

    config, _ = compose_config([f"model={name}"])
    sizes = config.model.model_dump(exclude={"name"})
    with torch.device("meta"):
        model = GLM(GLMConfig(**sizes))
    assert parameters(config.model) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("stage", "precision", "ranks", "each"),
    [(0, "fp32", 8, 16), (1, "fp32", 8, 8 + 8 / 8), (2, "bf16", 4, 2 + 14 / 4), (3, "fp16", 16, 1)],
)
def test_model_states_of_a_rank(stage: int, precision: str, ranks: int, each: float) -> None:
    """As in table 1 of the ZeRO paper."""
    config, _ = compose_config([f"parallel=zero{stage}", f"train.precision={precision}"])
    assert model_states(config, config.deepspeed, ranks) == round(parameters(config.model) * each)


def test_where_ranks_meet() -> None:
    layout = place(SOME.nodes)
    hellos = {name: _hello(machine=name) for name in "abc"}
    assert address_of_first(SOME, place(SOME.nodes[:1]), hellos) == "127.0.0.1"
    assert address_of_first(SOME, layout, hellos) == "10.0.0.1"
    named = on_hosts("cluster.interface=ib0")
    assert address_of_first(named, layout, hellos) == "10.1.0.1"
    wrong = on_hosts("cluster.interface=eth7")
    with pytest.raises(
        Exception, match="node a: there is no network interface eth7 with an address: it has ib0, lo"
    ):
        address_of_first(wrong, layout, hellos)
    unknown = {name: _hello(machine=name, address=None) for name in "abc"}
    with pytest.raises(Exception, match=r"node a: its address .* cluster\.interface"):
        address_of_first(SOME, layout, unknown)
    assert address_of_first(SOME, layout, {name: _hello(address=None) for name in "abc"}) == "127.0.0.1"


def test_gloo_on_loopback_and_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    hellos = {name: _hello(machine=name) for name in "abc"}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert address_of_first(SOME, place(SOME.nodes), hellos) == "10.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert address_of_first(SOME, place(SOME.nodes[:1]), hellos) == "127.0.0.1"
    with pytest.raises(
        ConfigError, match=r"GLOO_SOCKET_IFNAME=lo .* loopback .* 3 nodes cannot meet: unset it"
    ):
        address_of_first(SOME, place(SOME.nodes), hellos)


class _Time:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Time:
    found = _Time()
    monkeypatch.setattr(hang, "time", found)
    return found


def test_ranks_that_load_do_not_hang(clock: _Time) -> None:
    pulses = Pulses()
    pulses.take(0, 0, 1, "S")
    clock.now = 1000.0
    assert not pulses.hangs(10)
    pulses.take(0, 1, 3, "R")
    clock.now = 1009.0
    assert not pulses.hangs(10)
    clock.now = 1011.0
    assert pulses.hangs(10)
    assert not pulses.hangs(0)  # switched off
    pulses.take(0, 1, 4, "R")
    assert not pulses.hangs(10)


def _two_that_wait(clock: _Time, states: str = "SSS", counts: tuple[int, ...] = (9, 9, 9)) -> Pulses:
    pulses = Pulses()
    for rank, (state, count) in enumerate(zip(states, counts, strict=True)):
        pulses.take(rank, 5, count, state)
    clock.now += 30
    return pulses


WAITING = ['"/x/torch/distributed/c10d.py", line 1 in all_reduce']
OWN = ['"/home/me/data.py", line 7 in read', '"/home/me/train.py", line 9 in <module>']


def test_who_is_waited_for(clock: _Time) -> None:
    stopped = _two_that_wait(clock, "STS").suspect({})
    assert stopped == (1, "is stopped (SIGSTOP or a debugger) and has not gone on for 30 s")
    rank, why = _two_that_wait(clock).suspect({0: WAITING, 1: WAITING, 2: OWN})
    assert rank == 2
    assert 'in "/home/me/data.py", line 7 in read; the others wait for it' in why
    assert _two_that_wait(clock, counts=(9, 8, 9)).suspect({})[0] == 1
    assert _two_that_wait(clock).suspect({0: WAITING, 1: WAITING, 2: WAITING})[0] is None
    assert _two_that_wait(clock, "DDD").suspect({})[1].startswith("waits for a disk or a device")


def test_a_stopped_rank_is_found_before_the_first_step(clock: _Time) -> None:
    pulses = Pulses()
    pulses.take(0, 0, 1, "T")
    pulses.take(1, 0, 1, "S")
    clock.now = 20.0
    assert pulses.frozen(10) == [0]
    assert pulses.hangs(10)


def test_frames_are_those_of_the_thread_that_got_the_signal() -> None:
    text = (
        'Thread 0x01 (most recent call first):\n  File "/a.py", line 1 in other\n\n'
        'Current thread 0x02 (most recent call first):\n  File "/b.py", line 2 in f\n  File "/c.py", line 3 in g\n'
    )
    assert frames_of("step 1\n" + text) == ['"/b.py", line 2 in f', '"/c.py", line 3 in g']
    assert frames_of("step 1\n") == []


def _lines(path: Path, *entries: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def _step(number: int, seconds: float = 1.0) -> dict[str, Any]:
    return {"type": "step", "step": number, "seconds": seconds}


def test_goodput_counts_steps_that_were_kept_and_all_time(tmp_path: Path) -> None:
    """Steps 3 and 4 are made twice, and the launcher was killed in the second start."""
    _lines(
        tmp_path / "metrics.jsonl",
        {"type": "header"}, _step(1), _step(2), _step(3, 2.0), _step(4, 2.0),
        {"type": "header", "from_step": 3}, _step(3), _step(4), _step(5),
    )  # fmt: skip
    _lines(
        tmp_path / "logs" / "attempts.jsonl",
        {"start": 1, "began": 100.0}, {"start": 1, "ended": 110.0},
        {"start": 2, "began": 110.0},  # killed
        {"start": 3, "began": 125.0}, {"start": 3, "ended": 130.0},
    )  # fmt: skip
    with (tmp_path / "logs" / "attempts.jsonl").open("a") as file:
        file.write('{"start": 4, "beg')  # cut off
    assert goodput(tmp_path) == (5.0, 30.0)
    assert last_step(tmp_path) == 5
    assert last_step(tmp_path / "nothing") is None
    assert goodput(tmp_path / "nothing") == (0, 0.0)


def test_time_between_starts_counts_and_pauses_between_launches_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    now = iter([10.0, 20.0, 25.0, 500.0, 505.0])
    monkeypatch.setattr("xtrain.launch.incidents.time.time", lambda: next(now))
    first = Clock(tmp_path)
    for _ in range(2):
        first.begins()  # the second one begins where the first has ended
        first.ends(2, ["a"], "failed")
    again = Clock(tmp_path)
    assert again.starts == 2
    assert again.begins() == 3
    again.ends(2, ["a"], "done")
    assert goodput(tmp_path)[1] == 15.0 + 5.0


def test_incidents_say_where_and_what(tmp_path: Path) -> None:
    write_incident(tmp_path, Incident("rank", 2, "was killed by SIGKILL", "b", 3, 17, "starts again", ["x"]))
    write_incident(tmp_path, Incident("node", 3, "has gone", "b"))
    write_incident(tmp_path, Incident("rank", 1, "failed", "localhost", 0))
    write_incident(tmp_path, Incident("start", 1, "too few nodes answer"))
    found = read_incidents(tmp_path)
    assert [one["what"] for one in found] == [
        "rank 3 on b was killed by SIGKILL", "node b has gone", "rank 0 failed", "too few nodes answer",
    ]  # fmt: skip
    assert (found[0]["start"], found[0]["step"], found[0]["lines"]) == (2, 17, ["x"])
