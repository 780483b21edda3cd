"""Many items in batches that fit on the device: what to do where one does not, and how far the work has come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

import torch

from embedlens.errors import EmbedLensError
from embedlens.model_names import MINIATURE, unsigned

R = TypeVar("R")
T = TypeVar("T")


def in_batches(run: Callable[[int, Any], Iterable[R]], items: Any, batch_size: int | None = None) -> Iterator[R]:
    """What `run(start, batch)` gives of one batch after the other, in halves from where one does not fit on the device.

    `start` is the index of a batch's first item; a batch may run again with fewer. `items` can be sliced. One batch's
    results are held at a time. `batch_size` None: all at once, as long as they fit.

    >>> list(in_batches(lambda start, batch: [start + 10 * item for item in batch], [1, 2, 3], 2))
    [10, 20, 32]
    """
    batch_size = max(1, len(items)) if batch_size is None else batch_size
    if batch_size < 1:
        raise EmbedLensError(f"batch_size is {batch_size}: pass at least 1")
    start = 0
    while start < len(items):
        batch, found = items[start : start + batch_size], None
        try:
            found = list(run(start, batch))
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not out_of_memory(error):
                raise
        if found is None:  # out of the clause, whose traceback holds what filled the memory
            release()
            batch_size = len(batch) // 2
        else:
            start += len(batch)
            yield from found


def halving(run: Callable[[int], T], batch_size: int) -> tuple[T, int]:
    """What `run(batch_size)` gives, with half the batch as often as it does not fit on the device, and the last size,
    which accelerate's find_executable_batch_size does not say; it shrinks by a tenth, so that rounding moves.

    >>> halving(lambda batch_size: "so many at a time", 8)
    ('so many at a time', 8)
    """
    while True:
        try:
            return run(batch_size), batch_size
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not out_of_memory(error):
                raise
        release()
        batch_size //= 2


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a batch is too large for the device, or for main memory."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or should_reduce_batch_size(error)


def release() -> None:
    """Give back to the device what a failed attempt held."""
    from accelerate.utils import release_memory

    release_memory()


def watched(items: Iterable[T], model: str, what: str) -> Iterator[T]:
    """The items, with a bar on stderr that says how many are done and how long the rest will take (see `quiet`)."""
    from tqdm import tqdm

    total = len(items) if isinstance(items, Sized) else None
    yield from tqdm(items, desc=what, total=total, leave=False, **quiet(model))


def quiet(model: str, hidden: bool = False) -> dict[str, Any]:
    """How a bar is told whether to show itself: for the miniature, whose pages are printed, on a terminal only.

    >>> quiet("llava-hf/llava-1.5-7b-hf"), quiet("miniature")
    ({}, {'disable': None})
    """
    return {"disable": hidden or None} if hidden or unsigned(str(model)) == MINIATURE else {}
