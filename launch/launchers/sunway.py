"""bsub's command line on the new Sunway, as public job scripts have it; it starts the ranks itself. Never run by us."""

from __future__ import annotations

from xtrain.base.errors import ConfigError
from xtrain.launch.job import Job
from xtrain.launch.nodes import Layout


def command(job: Job, layout: Layout, environment: dict[str, str]) -> list[str]:
    """bsub, waiting for the job's end (-I), with its environment: one rank on each core group.

    Raises:
        ConfigError: the queue is not named, or the number of ranks a node differs from that of its core groups.
    """
    settings = job.cluster.sunway
    if settings.queue is None:
        raise ConfigError("cluster.sunway.queue is not set: name the queue that bsub is to use")
    if job.cluster.ranks_per_node != settings.core_groups:
        raise ConfigError(
            f"cluster.ranks_per_node={job.cluster.ranks_per_node}, but a rank is started on each of "
            f"cluster.sunway.core_groups={settings.core_groups}: make them equal"
        )
    words = ["bsub", "-I", "-b", "-q", settings.queue, "-N", str(len(layout.placements))]
    words += ["-cgsp", str(settings.compute_cores), "-mpecg", str(settings.core_groups)]
    for option, value in (("-share_size", settings.share_size), ("-cross_size", settings.cross_size)):
        words += [option, str(value)] if value is not None else []
    assignments = [f"{key}={value}" for key, value in sorted(environment.items())]
    python = job.cluster.python or "python3"
    return [*words, *settings.options, "env", *assignments, python, "-u", *job.rank_command(job.source)]
