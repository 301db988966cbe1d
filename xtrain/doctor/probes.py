"""Every collective of xtrain.comm on every dtype, against what it must give by its definition.

Inputs are small whole numbers that every dtype holds exactly and that follow from rank and place, so that any rank
knows the results without communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from xtrain import comm

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_PIECE = 5
"""Elements that one rank sends to another: odd, so that nothing is aligned by chance."""
_SUMMED = 15

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""(found, expected on the host)."""


class Wrong(Exception):
    """A collective gave other numbers than it should."""


@dataclass(frozen=True)
class Place:
    """Who probes: rank, number of ranks, and the device that the tensors are on."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def everyone(self) -> range:
        """All ranks."""
        return range(self.ranks)

    def empty(self, dtype: torch.dtype, count: int = _PIECE) -> torch.Tensor:
        """Memory that no result has."""
        return torch.full((count,), 113, device=self.device).to(dtype)


def short(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- inputs


def _marks(sender: int, receiver: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers up to 100 that tell who sent them to whom."""
    numbers = (torch.arange(_PIECE) + 37 * sender + 11 * receiver + 1) % 101
    return (numbers % 2 if dtype == torch.bool else numbers).to(dtype)


def _summands(rank: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    return (torch.arange(count) % 3 + rank % 2).to(dtype)


def _sums(ranks: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """The sum of all ranks' summands. Whole numbers wrap, as they do on every device."""
    return (torch.arange(count) % 3 * ranks + ranks // 2).to(dtype)


# ---------------------------------------------------------------- reductions


def _reduced(operation: str, at: Place, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(this rank's input, result of the operation over all ranks)."""
    places, mine = torch.arange(_SUMMED), _summands(at.rank, dtype, _SUMMED)
    if operation == "sum":
        return mine, _sums(at.ranks, dtype, _SUMMED)
    if operation == "avg":
        return mine, (_sums(at.ranks, torch.float64, _SUMMED) / at.ranks).to(dtype)
    if operation == "min":
        return mine, (places % 3).to(dtype)
    if operation == "max":
        return mine, (places % 3 + (at.ranks > 1)).to(dtype)
    factors = 1 + (places % at.ranks == at.rank).int()  # at each place, one rank's is 2
    return factors.to(dtype), torch.full((_SUMMED,), 2).to(dtype)


def _all_reduce(operation: str) -> Callable[[Place, torch.dtype], Pairs]:
    def probe(at: Place, dtype: torch.dtype) -> Pairs:
        mine, expected = _reduced(operation, at, dtype)
        tensor = mine.to(at.device)
        comm.all_reduce(tensor, op=getattr(comm.ReduceOp, operation.upper()))
        return [(tensor, expected)]

    return probe


def _reduce(at: Place, dtype: torch.dtype) -> Pairs:
    root = at.ranks - 1
    mine, expected = _reduced("sum", at, dtype)
    tensor = mine.to(at.device)
    comm.reduce(tensor, root)
    return [(tensor, expected)] if at.rank == root else []  # the others' contents are the library's


def _whole(at: Place, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(this rank's summands for every rank, this rank's slice of the sum)."""
    count = _PIECE * at.ranks
    mine = _summands(at.rank, dtype, count).to(at.device)
    return mine, _sums(at.ranks, dtype, count)[_PIECE * at.rank :][:_PIECE]


def _reduce_scatter_tensor(at: Place, dtype: torch.dtype) -> Pairs:
    mine, expected = _whole(at, dtype)
    part = at.empty(dtype)
    comm.reduce_scatter_tensor(part, mine)
    return [(part, expected)]


def _reduce_scatter(at: Place, dtype: torch.dtype) -> Pairs:
    mine, expected = _whole(at, dtype)
    part = at.empty(dtype)
    comm.reduce_scatter(part, [piece.clone() for piece in mine.chunk(at.ranks)])
    return [(part, expected)]


def _slice_sum(at: Place, dtype: torch.dtype) -> Pairs:
    mine, expected = _whole(at, dtype)
    return [(comm.SliceSum(mine, None).wait(), expected)]


def _canonical(at: Place, dtype: torch.dtype) -> Pairs:
    mine, expected = _reduced("sum", at, dtype)
    return [(comm.CanonicalAllReduce(mine.to(at.device), None).wait(), expected)]


# ---------------------------------------------------------------- moving


def _broadcast(at: Place, dtype: torch.dtype) -> Pairs:
    pairs = []
    for root in {0, at.ranks - 1}:
        tensor = _marks(root, root, dtype).to(at.device) if at.rank == root else at.empty(dtype)
        comm.broadcast(tensor, root)
        pairs.append((tensor, _marks(root, root, dtype)))
    return pairs


def _all_gather_into_tensor(at: Place, dtype: torch.dtype) -> Pairs:
    whole = at.empty(dtype, _PIECE * at.ranks)
    comm.all_gather_into_tensor(whole, _marks(at.rank, 0, dtype).to(at.device))
    return [(whole, torch.cat([_marks(rank, 0, dtype) for rank in at.everyone]))]


def _slice_gather(at: Place, dtype: torch.dtype) -> Pairs:
    whole = at.empty(dtype, _PIECE * at.ranks)
    comm.SliceGather(whole, _marks(at.rank, 0, dtype).to(at.device), None).wait()
    return [(whole, torch.cat([_marks(rank, 0, dtype) for rank in at.everyone]))]


def _all_gather(at: Place, dtype: torch.dtype) -> Pairs:
    pieces = [at.empty(dtype) for _ in at.everyone]
    comm.all_gather(pieces, _marks(at.rank, 0, dtype).to(at.device))
    return [(piece, _marks(rank, 0, dtype)) for rank, piece in enumerate(pieces)]


def _all_to_all_single(at: Place, dtype: torch.dtype) -> Pairs:
    received = at.empty(dtype, _PIECE * at.ranks)
    sent = torch.cat([_marks(at.rank, peer, dtype) for peer in at.everyone]).to(at.device)
    comm.all_to_all_single(received, sent)
    return [(received, torch.cat([_marks(peer, at.rank, dtype) for peer in at.everyone]))]


def _all_to_all(at: Place, dtype: torch.dtype) -> Pairs:
    received = [at.empty(dtype) for _ in at.everyone]
    comm.all_to_all(received, [_marks(at.rank, peer, dtype).to(at.device) for peer in at.everyone])
    return [(piece, _marks(peer, at.rank, dtype)) for peer, piece in enumerate(received)]


def _gather(at: Place, dtype: torch.dtype) -> Pairs:
    root = at.ranks - 1
    pieces = [at.empty(dtype) for _ in at.everyone] if at.rank == root else None
    comm.gather(_marks(at.rank, root, dtype).to(at.device), pieces, root)
    return [(piece, _marks(rank, root, dtype)) for rank, piece in enumerate(pieces or [])]


def _scatter(at: Place, dtype: torch.dtype) -> Pairs:
    root = at.ranks - 1
    sent = [_marks(root, rank, dtype).to(at.device) for rank in at.everyone] if at.rank == root else None
    mine = at.empty(dtype)
    comm.scatter(mine, sent, root)
    return [(mine, _marks(root, at.rank, dtype))]


def _send_and_recv(at: Place, dtype: torch.dtype) -> Pairs:
    after, before = (at.rank + 1) % at.ranks, (at.rank - 1) % at.ranks
    if at.ranks == 1:
        return []
    received = at.empty(dtype)
    works = comm.batch_isend_irecv(
        [
            comm.P2POp(comm.isend, _marks(at.rank, after, dtype).to(at.device), after),
            comm.P2POp(comm.irecv, received, before),
        ]
    )
    for work in works:
        work.wait()
    return [(received, _marks(before, at.rank, dtype))]


def _objects(at: Place) -> None:
    everyone: list[Any] = [None] * at.ranks
    comm.all_gather_object(everyone, {"rank": at.rank})
    if everyone != [{"rank": rank} for rank in at.everyone]:
        raise Wrong(f"all_gather_object gives {everyone}")
    told = ["from rank 0" if at.rank == 0 else ""]
    comm.broadcast_object_list(told, 0)
    if told != ["from rank 0"]:
        raise Wrong(f"broadcast_object_list gives {told}")


def _barrier(at: Place) -> None:
    comm.barrier()


# ---------------------------------------------------------------- all of them

WITH_DTYPE: dict[str, tuple[Callable[[Place, torch.dtype], Pairs], tuple[torch.dtype, ...]]] = {
    "all_reduce sum": (_all_reduce("sum"), DTYPES[:-1]),
    "all_reduce avg": (_all_reduce("avg"), FLOATS),
    "all_reduce min": (_all_reduce("min"), DTYPES[:-1]),
    "all_reduce max": (_all_reduce("max"), DTYPES[:-1]),
    "all_reduce product": (_all_reduce("product"), DTYPES[:-1]),
    "reduce": (_reduce, DTYPES[:-1]),
    "reduce_scatter_tensor": (_reduce_scatter_tensor, DTYPES[:-1]),
    "reduce_scatter": (_reduce_scatter, DTYPES[:-1]),
    "broadcast": (_broadcast, DTYPES),
    "all_gather_into_tensor": (_all_gather_into_tensor, DTYPES),
    "all_gather": (_all_gather, DTYPES),
    "all_to_all_single": (_all_to_all_single, DTYPES),
    "all_to_all": (_all_to_all, DTYPES),
    "gather": (_gather, DTYPES),
    "scatter": (_scatter, DTYPES),
    "send and recv": (_send_and_recv, DTYPES),
    "SliceSum": (_slice_sum, FLOATS),
    "SliceGather": (_slice_gather, FLOATS),
    "CanonicalAllReduce": (_canonical, (torch.float32,)),
}
WITHOUT_DTYPE: dict[str, Callable[[Place], None]] = {"objects": _objects, "barrier": _barrier}


def _checked(probe: Callable[[Place, torch.dtype], Pairs], at: Place, dtype: torch.dtype) -> None:
    for found, expected in probe(at, dtype):
        here = found.cpu()
        if here.dtype != expected.dtype or here.shape != expected.shape:
            raise Wrong(f"gives {here.dtype} of shape {tuple(here.shape)}")
        if expected.dtype.is_floating_point:  # exact but for the quotient of an average
            near = (here.double() - expected.double()).abs() <= 2 * torch.finfo(expected.dtype).eps
        else:
            near = here == expected
        if not bool(near.all()):
            first = int((~near).nonzero()[0])
            raise Wrong(f"element {first} is {here[first].item()}, expected {expected[first].item()}")


def run(at: Place) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """All probes in order: (collective, dtype or "", what raises when it goes wrong)."""
    for name, plain in WITHOUT_DTYPE.items():
        yield name, "", partial(plain, at)
    for name, (probe, dtypes) in WITH_DTYPE.items():
        for dtype in dtypes:
            yield name, short(dtype), partial(_checked, probe, at, dtype)
