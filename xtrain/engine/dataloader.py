"""The loader that `initialize(training_data=...)` returns: each rank's share, in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from xtrain.parallel import DataParallelGrid


def make_dataloader(
    dataset: Dataset[Any],
    batch_size: int,
    grid: DataParallelGrid,
    shuffle: bool,
    drop_last: bool,
    collate_fn: Callable[..., Any] | None,
    workers: int,
    sampler: Any,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A DataLoader over this rank's share of a map-style dataset, or over an iterable one as it is."""
    if isinstance(dataset, IterableDataset):
        sampler = None
    elif sampler is None:
        sampler = DistributedSampler(
            dataset, grid.replicas, grid.replica, shuffle=shuffle, drop_last=drop_last
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        drop_last=drop_last,
        pin_memory=pin_memory,
    )


class RepeatingLoader:
    """Restarts a loader, or anything else that can be iterated over again, when it ends, as DeepSpeed's
    RepeatingLoader does; epochs of a loader with a DistributedSampler are reshuffled."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.epoch = 0
        self._iterator = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except StopIteration:
            self.epoch += 1
            sampler = getattr(self.loader, "sampler", None)
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(self.epoch)
            self._iterator = iter(self.loader)
            return next(self._iterator)
