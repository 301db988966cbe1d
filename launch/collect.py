"""Run folders on the nodes' own disks (cluster.shared=false): record and checkpoints come to the launcher's machine.

Nodes write the checkpoint's parts that their ranks own. When all have, the parts are fetched and put together here, so
that the loss of a node loses nothing; before the next start, each node gets the whole checkpoint.
"""

from __future__ import annotations

import shlex
import subprocess
import threading

from xtrain.base.errors import CheckpointError, ConfigError
from xtrain.base.files import remove, sync_directory, write_text
from xtrain.base.run_folder import CHECKPOINTS, METRICS
from xtrain.checkpoint.contents import LATEST
from xtrain.launch.checkpoints import Source, check_whole
from xtrain.launch.job import Job
from xtrain.launch.launchers.agents import remote_command
from xtrain.launch.nodes import Layout, Node

KEPT_ON_NODES = 2
"""Checkpoints that stay on the nodes' disks."""


class Collector:
    """Of one start of the run; `apart` are the nodes whose run folder is not the launcher's."""

    def __init__(self, job: Job, layout: Layout, apart: list[Node]) -> None:
        self._job, self._apart = job, apart
        self._here = len(apart) < len(layout.nodes)
        self._saved: dict[str, set[str]] = {}
        self._wanted: list[str] = []
        self._thread: threading.Thread | None = None
        self._fetched = False
        self.troubles: list[str] = []
        """What could not be fetched, in words."""

    def record(self, text: str) -> None:
        """Rank 0's node has written more of the record."""
        with (self._job.run_dir / METRICS).open("a", encoding="utf-8") as file:
            file.write(text)

    def saved(self, node: Node, tag: str) -> None:
        """A node has its part of a checkpoint; when all have, it is fetched."""
        nodes = self._saved.setdefault(tag, set())
        nodes.add(node.name)
        if node in self._apart and {one.name for one in self._apart} <= nodes:
            self._wanted.append(tag)
        self.go_on()

    def go_on(self) -> bool:
        """Begin to fetch what is wanted; whether nodes may now remove older checkpoints."""
        if self._thread is not None and self._thread.is_alive():
            return False
        if self._wanted:
            # Older ones that have waited meanwhile are not worth the way.
            tag, self._wanted = self._wanted[-1], []
            self._thread = threading.Thread(target=self._fetch, args=(tag,))
            self._thread.start()
            return False
        fetched, self._fetched = self._fetched, False
        return fetched

    def finish(self) -> None:
        """Fetch the newest, and wait for it."""
        while True:
            if self._thread is not None:
                self._thread.join()
            if not self._wanted:
                return
            self.go_on()

    def _fetch(self, tag: str) -> None:
        """A thread: the parts of all nodes into one folder, which gets its name when it is whole."""
        folder = self._job.run_dir / CHECKPOINTS
        target, temporary = folder / tag, folder / f".{tag}.fetched"
        try:
            if self._here and target.is_dir():
                temporary = target  # the launcher's own node has published its part under the name
            else:
                remove(temporary)
                temporary.mkdir(parents=True)
            for node in self._apart:
                words = ["tar", "-C", str(target), "-cf", "-", "."]
                _pipe(
                    remote_command(self._job.cluster, node, shlex.join(words)),
                    ["tar", "-C", str(temporary), "-xf", "-"],
                )
            check_whole(temporary)
            if temporary != target:
                remove(target)
                temporary.rename(target)
            sync_directory(folder)
            write_text(folder / LATEST, tag)
            self._fetched = True
        except (CheckpointError, OSError, subprocess.CalledProcessError) as error:
            if temporary != target:
                remove(temporary)
            self.troubles.append(f"checkpoint {tag} could not be fetched from the nodes: {error}")


def hand_out(job: Job, source: Source | None, apart: list[Node]) -> None:
    """Give every node the whole checkpoint that the next start continues from.

    Raises:
        ConfigError: it is not this run's own, or a node cannot take it.
    """
    if source is None or not apart:
        return
    folder = job.run_dir / CHECKPOINTS
    if source.folder != folder or source.tag is None:
        raise ConfigError(
            "with cluster.shared=false, a run continues from its own folder only: say resume=auto"
        )
    for node in apart:
        take = f"mkdir -p {shlex.quote(str(folder))} && tar -C {shlex.quote(str(folder))} -xf -"
        try:
            _pipe(
                ["tar", "-C", str(folder), "-cf", "-", source.tag, LATEST],
                remote_command(job.cluster, node, take),
            )
        except subprocess.CalledProcessError as error:
            raise ConfigError(
                f"node {node.name}: checkpoint {source.tag} could not be copied to it: {error}"
            ) from None


def _pipe(first: list[str], second: list[str]) -> None:
    """`first | second`, both of which have to succeed."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(first, stdout=subprocess.PIPE, stdin=quiet, stderr=quiet) as writer:
        subprocess.run(second, stdin=writer.stdout, stdout=quiet, stderr=quiet, check=True)
    if writer.returncode:
        raise subprocess.CalledProcessError(writer.returncode, first)
