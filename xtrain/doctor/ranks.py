"""What a rank does for the doctor: join, probe every collective, measure. `python -m xtrain.doctor.ranks FOLDER SPEC`.

Writes everything into FOLDER/RANK.jsonl, for the process that watches (watch.py).
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from xtrain.doctor.event_log import Diary

_RANK_VARIABLES = ("RANK", "PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Spec:
    """What to probe. `store`: a file where the ranks meet; None: as their launcher says."""

    backend: str
    library: str
    bandwidth: bool
    patience: float
    store: str | None = None

    def text(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))


def launched_rank() -> int:
    """This process's number by its launcher, before anything is imported."""
    return int(next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0"))


def sentence(error: BaseException) -> str:
    """An error in one line; its class where that is no name for users."""
    from xtrain.base.errors import XtrainError

    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text if isinstance(error, XtrainError) else f"{type(error).__name__}: {text}"


def probe(spec: Spec, diary: Diary) -> None:
    """Join the other ranks, probe and measure. What goes wrong in a collective is written down, not raised.

    Raises:
        BackendError: the backend or the process group cannot be had here.
    """
    from xtrain import comm
    from xtrain.backends import registry
    from xtrain.doctor import bandwidth, probes

    backend = registry.get(spec.backend)
    with diary.doing(f"taking the device of backend {spec.backend}"):
        backend.prepare(comm.find_local_rank())
    with diary.doing(f"starting {spec.library}"):
        comm.init_distributed(
            spec.library,
            verbose=False,
            timeout=timedelta(seconds=2 * spec.patience),  # the one who watches is quicker
            init_method=None if spec.store is None else f"file://{spec.store}",
            rank=-1 if spec.store is None else launched_rank(),
            world_size=-1 if spec.store is None else int(os.environ["WORLD_SIZE"]),
        )
    at = probes.Place(comm.get_rank(), comm.get_world_size(), backend.runtime.device(comm.get_local_rank()))
    diary.write("joined", rank=at.rank, ranks=at.ranks, device=str(at.device))
    for name, dtype, action in probes.run(at):
        diary.write("begin", what=f"{name} of {dtype}" if dtype else name)
        state, why = "ok", None
        try:
            action()
            backend.runtime.synchronize()
        except probes.Wrong as error:
            state, why = "wrong", str(error)
        except Exception as error:  # libraries raise what they like
            state, why = "refused", sentence(error)
        diary.write("probe", name=name, dtype=dtype, state=state, why=why)
    if spec.bandwidth:
        diary.write("begin", what="measuring bandwidth")
        for entry in bandwidth.measure(at.device, backend.runtime.synchronize):
            diary.write("bandwidth", **entry)
    with diary.doing(f"ending {spec.library}"):
        comm.barrier()
    diary.write("done")


def main(arguments: list[str]) -> int:
    """One rank that the doctor has started."""
    folder, spec = Path(arguments[0]), Spec(**json.loads(arguments[1]))
    from xtrain.launch.processes import die_with_parent

    die_with_parent()
    diary = Diary(folder / f"{launched_rank()}.jsonl")
    diary.write("started", pid=os.getpid())
    try:
        probe(spec, diary)
    except Exception as error:
        diary.write("error", why=sentence(error))
        return 1
    from xtrain import comm

    comm.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
