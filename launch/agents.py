"""One start of a run's ranks through agents: who answers, who gets which ranks, and how it ends."""

from __future__ import annotations

import os
import queue
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.base.run_folder import APART_VARIABLE, ATTEMPT_VARIABLE, LOGS
from xtrain.launch.channel import Channel, Event
from xtrain.launch.collect import KEPT_ON_NODES, Collector, hand_out
from xtrain.launch.environment import exported, interface, visible_devices
from xtrain.launch.failure import Failure, from_json
from xtrain.launch.hang import Pulses
from xtrain.launch.job import Job
from xtrain.launch.launchers.agents import agent_command, explain_silence
from xtrain.launch.nodes import Layout, Node
from xtrain.launch.processes import signal_name
from xtrain.launch.start import Outcome

_PING = 1.0
_SETTLE = 3.0
"""Seconds after the first failure in which others may say what they know."""
_STACKS = 5.0
"""Seconds in which agents answer with stacks."""


class Agents:
    """The agents of one start.

    Attributes:
        channels: by the name of the node, in the order of the job.
        signalled: nodes whose agents got a signal of their own, and which.
    """

    def __init__(self, job: Job, nodes: Sequence[Node]) -> None:
        self.job = job
        self.channels: dict[str, Channel] = {}
        self.signalled: dict[str, str] = {}
        self.collector: Collector | None = None
        self.troubles: list[str] = []
        self._by_rank: tuple[int, str] | None = None
        self.pulses = Pulses()
        self._events: queue.Queue[tuple[Channel, Event]] = queue.Queue()
        self._failures: list[Failure] = []
        self._lost: dict[str, str] = {}
        self._failing_since: float | None = None
        self._stacks: dict[int, list[str]] = {}
        self._busy: set[int] = set()
        self._next_stacks = 0.0
        self._stacks_since: float | None = None
        self._next_ping = 0.0
        for index, node in enumerate(nodes):
            peer = nodes[index - 1].name if len(nodes) > 1 else None
            self._open(node, peer)

    def _open(self, node: Node, peer: str | None) -> None:
        log = self.job.run_dir / LOGS / f"agent-{node.name}.log"
        exported = {**os.environ, **self.job.cluster.env}
        channel = Channel(node, agent_command(self.job.cluster, node), log, self._events, exported)
        token = self.job.run_dir / "config.yaml"
        files = [str(self.job.script)]
        channel.introduce(
            node=node.name,
            peer=peer,
            run_dir=str(self.job.run_dir),
            token=str(token),
            files=files,
            backend=self.job.backend,
        )
        self.channels[node.name] = channel

    def answered(self) -> bool:
        """Whether every agent has said what it has found, or is not going to."""
        self._take_events()
        return not any(channel.hello is None and not channel.closed for channel in self.channels.values())

    def hellos(self) -> dict[str, dict[str, Any]]:
        """What the agents that are there have found, by the name of the node."""
        return {
            name: channel.hello
            for name, channel in self.channels.items()
            if channel.hello is not None and not channel.closed
        }

    def gather(self, patience: float, given_up: Callable[[], bool]) -> dict[str, str]:
        """Wait until every agent has said what it has found; those that have not, and why."""
        until = time.monotonic() + patience
        while not self.answered() and time.monotonic() < until and not given_up():
            time.sleep(0.02)
        absent, here = {}, self.hellos()
        for name, channel in list(self.channels.items()):
            if name not in here:
                absent[name] = explain_silence(channel.node, channel.printed(), channel.process.poll())
                self.drop(name)
        return absent

    def drop(self, name: str) -> None:
        """Go on without a node."""
        self.channels.pop(name).end()
        self._lost.pop(name, None)

    def launch(self, layout: Layout, number: int, address: str, given_up: Callable[[], bool]) -> None:
        """Start the ranks.

        Args:
            number: of this start of the run.
            address: of the first node, for the others; loopback where there are no others.

        Raises:
            ConfigError: the first node cannot open the run's store, in one sentence.
        """
        apart = [node for node in layout.nodes if not (self.channels[node.name].hello or {})["shared"]]
        hand_out(self.job, self.job.source, apart)
        if apart:
            self.collector = Collector(self.job, layout, apart)
        first = self.channels[layout.placements[0].node.name]
        secret = secrets.token_hex(32)
        first.order("open", address=address, secret=secret, master_port=self.job.cluster.master_port)
        opened = self._opened(first, given_up)
        if opened is None:
            return
        job = self.job
        common: dict[str, Any] = {
            "run_dir": str(job.run_dir),
            "secret": secret,
            "store": opened["store"],
            "master": [address, opened["master_port"]],
            "nodes": len(layout.placements),
            "node_timeout": job.cluster.node_timeout,
            "files": {"ds_config.json": job.config_for(layout.ranks)},
            "folder": os.getcwd(),
            "command": job.rank_command(job.source),
        }
        for placement in layout.placements:
            channel = self.channels[placement.node.name]
            env = {**exported(), **job.env, ATTEMPT_VARIABLE: str(number)}
            env.update(visible_devices(job, placement.node, placement.ranks))
            if apart:
                env[APART_VARIABLE] = "1"
            env = {**interface(channel.hello or {}, address, job.cluster), **env}
            channel.order(
                "start",
                **common,
                node=placement.node.name,
                node_rank=placement.index,
                first_rank=placement.first_rank,
                ranks=placement.ranks,
                apart=placement.node in apart,
                env=env,
            )

    def _opened(self, first: Channel, given_up: Callable[[], bool]) -> dict[str, Any] | None:
        until = time.monotonic() + self.job.cluster.start_timeout
        while not given_up():
            try:
                channel, event = self._events.get(timeout=0.1)
            except queue.Empty:
                if time.monotonic() > until:
                    raise ConfigError(
                        f"node {first.node.name}: its agent did not become ready within "
                        f"{self.job.cluster.start_timeout:g} s (cluster.start_timeout): see {first.log}"
                    ) from None
                self._ping()
                continue
            if channel is first and event.name == "opened":
                return event.about
            if channel is first and event.name == "closed":
                raise ConfigError(explain_silence(first.node, first.printed(), event.about["code"]))
            self._take(channel, event)
        return None

    # While the ranks run.

    def poll(self) -> Outcome | None:
        """What has ended the start; None while it goes on."""
        self._take_events()
        self._ping()
        if self.collector is not None and self.collector.go_on():
            for channel in self.channels.values():
                channel.order("prune", keep=KEPT_ON_NODES)
        channels = list(self.channels.values())
        for channel in channels:
            # An agent that still imports torch may be silent for longer.
            patience = max(
                self.job.cluster.node_timeout, 0 if channel.started else self.job.cluster.start_timeout
            )
            if not channel.ended and channel.silent > patience:
                self._lose(channel, f"has given no sign of life for {channel.silent:.0f} s")
        if channels and all(channel.done for channel in channels):
            stopped = any(channel.stopped for channel in channels)
            return Outcome(
                "stopped" if stopped else "done", by_rank=self._by_rank, by_node=dict(self.signalled)
            )
        if self._failing_since is not None:
            return self._failed(time.monotonic() - self._failing_since)
        return self._hanging()

    def _failed(self, waited: float) -> Outcome | None:
        """The outcome when nothing more is to be learnt."""
        known = self._lost or any(not failure.is_consequence for failure in self._failures)
        silent = max((c.silent for c in self.channels.values() if not c.ended), default=0.0)
        # Ranks that only lost a connection: the node at its other end is about to be found silent, if it has gone.
        patience = _SETTLE if known or silent < 2 * _PING + 1 else self.job.cluster.node_timeout + _SETTLE
        heard = {failure.host for failure in self._failures} | set(self._lost)
        if waited < patience and not (known and heard >= set(self.channels)):
            return None
        return Outcome("failed", list(self._failures), dict(self._lost))

    def _hanging(self) -> Outcome | None:
        limit = self.job.cluster.hang_timeout
        if self._stacks_since is None:
            if self.pulses.hangs(limit) and time.monotonic() > self._next_stacks:
                self._stacks_since, self._stacks, self._busy = time.monotonic(), {}, set()
                for channel in self.channels.values():
                    channel.order("stacks")
            return None
        if not self.pulses.hangs(limit):
            self._stacks_since = None  # it goes on after all
            return None
        if time.monotonic() - self._stacks_since < _STACKS:
            return None
        if self.pulses.works(limit, self._stacks, self._busy):
            self._stacks_since, self._next_stacks = None, time.monotonic() + limit / 2
            return None
        return Outcome("hang", suspect=self.pulses.suspect(self._stacks))

    def _take_events(self) -> None:
        while True:
            try:
                self._take(*self._events.get_nowait())
            except queue.Empty:
                return

    def _take(self, channel: Channel, event: Event) -> None:
        if self.channels.get(channel.node.name) is not channel:
            return  # of a node that does not take part
        about = event.about
        if event.name == "beat":
            for rank, (step, count, state) in about["ranks"].items():
                self.pulses.take(int(rank), step, count, state)
        elif event.name == "started":
            channel.started = True
        elif event.name == "stacks":
            self._stacks.update({int(rank): frames for rank, frames in about["ranks"].items()})
            self._busy.update(about["busy"])
        elif event.name == "failed":
            self._failures += [from_json(failure) for failure in about["failures"]]
            self._failing_since = self._failing_since or time.monotonic()
            channel.failed = True
        elif event.name == "done":
            channel.done, channel.stopped = True, about["stopped"]
            if about["signalled"] is not None:
                self._by_rank = about["signalled"]["rank"], about["signalled"]["signal"]
        elif event.name == "record" and self.collector is not None:
            self.collector.record(about["text"])
        elif event.name == "saved" and self.collector is not None:
            self.collector.saved(channel.node, about["tag"])
        elif event.name == "signalled":
            self.signalled[channel.node.name] = signal_name(about["signal"])
        elif event.name == "closed" and channel.hello is not None and not (channel.done or channel.failed):
            self._lose(channel, _closing(about["code"], channel.printed()))

    def _lose(self, channel: Channel, how: str) -> None:
        if channel.node.name not in self._lost:
            self._lost[channel.node.name] = how
            self._failing_since = self._failing_since or time.monotonic()

    def _ping(self) -> None:
        if time.monotonic() > self._next_ping:
            self._next_ping = time.monotonic() + _PING
            for channel in self.channels.values():
                channel.order("ping", sent=time.time())

    def stop_ranks(self) -> None:
        """Have all ranks save at the same step and leave."""
        for channel in self.channels.values():
            channel.order("stop")

    def end(self, politely: bool) -> None:
        """End agents and ranks.

        Args:
            politely: the ranks have ended by themselves.
        """
        for channel in self.channels.values():
            channel.order("leave" if politely else "end")
        for channel in self.channels.values():
            channel.end()
        self._take_events()
        if self.collector is not None:
            self.collector.finish()
            self.troubles += self.collector.troubles


def _closing(code: int, printed: list[str]) -> str:
    """How the connection to an agent has ended."""
    if code < 0:
        return f"has lost its agent, which was killed by {signal_name(-code)}"
    said = f": {printed[-1].strip()}" if printed else ""
    return f"has lost its agent (status {code}{said})"
