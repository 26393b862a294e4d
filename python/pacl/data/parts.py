"""Parts of a source, shared among processes and their data readers, for commands that write one file for each part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from .readers import ReaderLoader, worker_options
from .samples import Part, Samples, collate

T = TypeVar("T")


class PartBatch(NamedTuple):
    """A batch of one part. number: that of the part. samples: None if no good one is left. last: True at its end."""

    number: int
    samples: dict[str, Any] | None
    last: bool


def block(items: Sequence[T], place: int, places: int) -> Sequence[T]:
    """Return the share of `place` (from 0) of so many places: neighbours, because those of a shard are read faster."""
    return items[len(items) * place // places : len(items) * (place + 1) // places]


def part_batches(
    source: Samples, parts: Sequence[tuple[int, Part]], batch_size: int, *, workers: int = 0
) -> Iterator[PartBatch]:
    """Yield the good samples of the parts in batches that never cross the end of a part.

    parts: each with its number. Every part is read by one worker, so the batches of a part come in order, and are the
    same for any number of workers. Those of other parts come between them. Raises BadData as Samples does.
    """
    reading = _Parts(source, parts, batch_size)
    options: dict[str, Any] = worker_options(min(workers, len(parts))) | {"collate_fn": _unchanged}
    yield from ReaderLoader(reading, batch_size=None, **options).watched()


class _Parts(IterableDataset):
    def __init__(self, source: Samples, parts: Sequence[tuple[int, Part]], batch_size: int):
        self.source, self.all_parts, self.batch_size = source, parts, batch_size
        self.name = source.name

    def __iter__(self) -> Iterator[PartBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for number, part in block(self.all_parts, worker, workers):
            samples: list[dict[str, Any]] = []
            for raw in self.source.part(part):
                sample = self.source.decode(raw, worker)
                if sample is not None:
                    samples.append(sample)
                if len(samples) == self.batch_size:
                    yield PartBatch(number, collate(samples), last=False)
                    samples = []
            yield PartBatch(number, collate(samples) if samples else None, last=True)


def _unchanged(batch: PartBatch) -> PartBatch:
    """Return the batch. A named function, because it may be pickled."""
    return batch
