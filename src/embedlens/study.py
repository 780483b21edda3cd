"""One study over many pictures: `run(study, model, samples)` → a table, resumable, in one process or several.

A study is a function (model, sample) → one flat record, or several: one per token, layer or question. Samples are
measured in chunks. Where rows are kept, a finished chunk is a file, named by a digest of the study, the model and the
samples: a run that was killed loses the chunk in flight and goes on from the others, and no other's rows are taken.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from embedlens import batches, kept
from embedlens.errors import EmbedLensError, writing
from embedlens.processes import processes
from embedlens.samples import Sample
from embedlens.vlm import VisionLanguageModel

AUTO = "auto"
LARGEST = 64  # samples in a batch that "auto" tries first on a GPU
ON_CPU = 8  # samples in a batch that "auto" takes on a CPU, where running out of memory ends the process
SINGLE = 8  # samples in a chunk of a study that takes one at a time
Answer: TypeAlias = "dict[str, Any]"
"""Of one sample: id, and its rows or the error in their place."""


def run(
    study: Callable[..., Any],
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    out: str | Path | None = None,
    batch_size: int | str | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Run a study on every sample; one row per record it gives.

    Where `accelerate launch` or torchrun started several processes, the batches are dealt out to them and all return
    the same table. Load the model on `accelerate.PartialState().device` then; without a GPU use torchrun, because
    `accelerate launch --cpu` starts one process only.

    Without `out`, rows are kept where the environment variable EMBEDLENS_ROWS names a folder, and found again by what
    was run on what: every study of a notebook goes on after a kill, and nothing in it has to be changed for that.
    `embedlens book` sets it, and so does the first cell of a notebook on Colab where a drive is mounted.

    A sample that raises EmbedLensError or OSError (a damaged picture) is left out of the table; one warning at the end
    says how many, `table.attrs["failed"]` which. Calling again tries them again. Any other exception is a bug of the
    study and is raised at once; chunks that were finished stay on disk.

    Args:
        study: (model, sample) → a flat record {name: number, text, bool or None}, or several. With `batch_size` it
            gets a list of samples and gives, for each, its record or records. What else it needs is bound with
            `functools.partial` and is part of what identifies the run; of globals, functions and plain values are.
        samples: any iterable; read once, a batch at a time. Pictures that the study opens are let go.
        out: a folder for rows; a call that finds its own chunks there goes on from them.
        batch_size: samples at a time; batches are the same whatever the number of processes. "auto": as many as fit,
            found by halving from 64 on a GPU, 8 on a CPU; a resumed run keeps what was found. A batch that does not
            fit after all is measured in halves.
        progress: show a bar on stderr; None: if that is a terminal, or the model is not the miniature.

    Returns:
        The rows in the order of the samples. Column `id`, the sample's, comes first unless the study writes its own.

    Raises:
        EmbedLensError: no samples, all failed, no rows at all, a record that is not flat, a disk that refuses, or an
            `out` for a study that is not known by its value.

    >>> import functools
    >>> import embedlens as el
    >>> def length(model, sample, question):
    ...     return {"positions": len(model.prompt(sample.image, question))}
    >>> study = functools.partial(length, question="What is in the picture?")
    >>> table = el.run(study, el.load("miniature"), el.samples.load("miniworld", n=3))
    >>> table.columns.tolist(), table["id"].tolist()
    (['id', 'positions'], [0, 1, 2])
    """
    if isinstance(batch_size, str) and batch_size != AUTO:
        raise EmbedLensError(f"batch_size is {batch_size!r}: pass a number, 'auto', or None for one sample at a time")
    if isinstance(batch_size, int) and batch_size < 1:
        raise EmbedLensError(f"batch_size is {batch_size}: pass at least 1, or None for one sample at a time")
    together = processes(model.device.type)
    folder, key = _place(study, model, out)
    size = batch_size if isinstance(batch_size, int) else None
    if isinstance(batch_size, str):
        stream = iter(samples)
        first = list(islice(stream, LARGEST))
        samples = samples if isinstance(samples, Sized) else chain(first, stream)
        fitting = partial(fitting_batch_size, study, model, first)
        size = min(together.gathered(kept.remembered((key, AUTO), fitting, folder) if folder else fitting()))

    def measured(chunk: list[Sample]) -> list[Answer]:
        # a list of samples must not fill up with decoded pictures
        chunk = [sample if "image" in vars(sample) else replace(sample) for sample in chunk]
        parts = [chunk] if size else [[sample] for sample in chunk]
        return [answer for batch in parts for answer in _answers(study, model, batch, size)]

    def known(chunk: list[Sample]) -> list[Answer]:
        """A chunk is measured whole or not at all, as in another company a sample's last bits may differ.

        What failed is tried again.
        """
        if folder is None:
            return measured(chunk)
        what = key, size, list(map(kept.of_sample, chunk))
        tried = partial(measured, chunk)
        return kept.remembered(what, tried, folder, lambda made: all("rows" in one for one in made))

    stream, count, found = iter(samples), 0, dict[int, "list[Answer]"]()
    total = len(samples) if isinstance(samples, Sized) else None
    quiet = batches.quiet(model.name, together.rank != 0)
    if together.rank == 0 and progress is not None:
        quiet = {"disable": not progress}
    with tqdm(total=total, unit="sample", leave=False, **quiet) as bar:
        for number, chunk in enumerate(iter(lambda: list(islice(stream, size or SINGLE)), [])):
            if number % together.count == together.rank:
                found[number] = known(chunk)
            count += len(chunk)
            bar.update(len(chunk))
    if count == 0:
        raise EmbedLensError("no samples: pass at least one")
    parts = together.gathered((count, found))
    counts = {count for count, _ in parts}
    if len(counts) > 1:
        raise EmbedLensError(f"the processes were given {sorted(counts)} samples: give every process the same")
    found = {number: answers for _, own in parts for number, answers in own.items()}
    table = _table([answer for number in sorted(found) for answer in found[number]])
    if table.attrs["failed"] and together.rank == 0:
        failed = table.attrs["failed"]
        warnings.warn(
            f"{len(failed)} of {count} samples could not be measured and are not in the table; "
            f"the first is sample {failed[0]['id']}: {failed[0]['error']}",
            stacklevel=2,
        )
    return table


def fitting_batch_size(study: Callable[..., Any], model: VisionLanguageModel, samples: Sequence[Sample]) -> int:
    """The largest power of two up to 64, or the number of samples, at which a batch fits into memory.

    What the study gives is thrown away. A CPU is not tried but given 8: where its memory runs out, nothing is raised
    that could be caught. EmbedLensError: not even one sample fits.
    """
    if not len(samples):
        raise EmbedLensError("no samples: pass at least one")
    if model.device.type == "cpu":
        return ON_CPU

    def tried(size: int) -> None:
        try:
            study(model, [replace(sample) for sample in samples[:size]])
        except (EmbedLensError, OSError):
            pass  # a damaged picture, which the run records

    try:
        return batches.halving(tried, 2 ** (min(LARGEST, len(samples)).bit_length() - 1))[1]
    except (RuntimeError, MemoryError) as error:
        if batches.out_of_memory(error):
            raise EmbedLensError(_too_little(model)) from None
        raise


def rehearse(
    study: Callable[..., Any], model: VisionLanguageModel, samples: Sequence[Sample], batch_size: int | None
) -> float:
    """Seconds that one sample takes here, an estimate: the first batch, the second time it is run, thrown away."""
    if not len(samples):
        raise EmbedLensError("no samples: pass at least one")
    batch = list(samples[: batch_size or 1])
    began = 0.0
    for _ in range(2):
        began = time.perf_counter()
        _answers(study, model, [replace(sample) for sample in batch], batch_size)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
    return (time.perf_counter() - began) / len(batch)


def _place(study: Callable[..., Any], model: VisionLanguageModel, out: str | Path | None) -> tuple[Path | None, str]:
    """The folder of rows, if they are kept, and a digest of what gives them."""
    rows = out if out is not None else os.environ.get(kept.ROWS) or None
    if rows is None:
        return None, ""
    try:
        key = kept.digest((kept.of_study(study), kept.of_model(model)))
    except TypeError as error:
        if out is None:
            return None, ""  # nobody asked for these
        raise EmbedLensError(
            f"the study cannot be told from another on resuming: {error}; bind numbers, texts, arrays or frozen "
            "dataclasses of these, or leave out=None"
        ) from None
    folder = Path(rows).expanduser()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder, key


def _answers(
    study: Callable[..., Any], model: VisionLanguageModel, batch: list[Sample], batch_size: int | None
) -> list[Answer]:
    """Of a batch; in halves where it does not fit on the device, one by one where a sample cannot be measured."""
    try:
        given = study(model, batch[0] if batch_size is None else batch)
        if batch_size is None:
            given = [_listed(given)]
        elif isinstance(given, Iterable) and not isinstance(given, (str, Mapping)):
            given = [_listed(rows) for rows in given]
    except (EmbedLensError, OSError) as error:
        if len(batch) == 1:
            return [{"id": batch[0].id, "error": _sentence(error)}]
        parts = [[sample] for sample in batch]
    except (RuntimeError, MemoryError) as error:
        if not batches.out_of_memory(error):
            raise
        parts = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    else:
        return _checked(given, batch)
    batches.release()  # out of the clause, whose traceback holds what filled the memory
    if len(batch) == 1:
        return [{"id": batch[0].id, "error": _too_little(model)}]
    return [answer for part in parts for answer in _answers(study, model, part, batch_size)]


def _checked(given: Any, batch: Sequence[Sample]) -> list[Answer]:
    if not isinstance(given, list) or len(given) != len(batch):
        what = f"{len(given)} results" if isinstance(given, list) else _kind(given)
        raise EmbedLensError(
            f"the study gave {what} for a batch of {len(batch)} samples: with batch_size it returns a list with one "
            "record, or one list of records, per sample"
        )
    return [{"id": sample.id, "rows": _rows(rows, sample)} for rows, sample in zip(given, batch, strict=True)]


def _listed(given: Any) -> Any:
    """Several records, read to the end (a study may be a generator); anything else as it is, for `_rows` to refuse."""
    if isinstance(given, Mapping):
        return [given]
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else given


def _rows(given: Any, sample: Sample) -> list[dict[str, Any]]:
    wrong = [entry for entry in given if not isinstance(entry, Mapping)] if isinstance(given, list) else [given]
    if wrong:
        raise EmbedLensError(
            f"the study gave {_kind(wrong[0])} for sample {sample.id}: return one record (a dict) or a list of records"
        )
    rows = [{str(name): _plain(value, str(name)) for name, value in row.items()} for row in given]
    return [row if "id" in row else {"id": sample.id, **row} for row in rows]


def _plain(value: Any, name: str) -> str | int | float | bool | None:
    """The value as JSON holds it, exactly: every float32 is a float64, whose repr reads back as itself."""
    if isinstance(value, np.generic) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0):
        value = value.item()
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if value is None:
        return None
    raise EmbedLensError(
        f"the study's value {name!r} is {_kind(value)}: a record is flat, so return one record per entry, or join the "
        "entries to one text"
    )


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, EmbedLensError) else f"{type(error).__name__}: {text}"


def _too_little(model: VisionLanguageModel) -> str:
    return (
        f"{model.device} has too little memory for one sample of this study: load the model with quantize='4bit', "
        "dtype='bfloat16' or, with several GPUs, device='auto'"
    )


def _table(answers: Sequence[Answer]) -> pd.DataFrame:
    """The rows in order, and in `attrs["failed"]` the samples that have none."""
    failed = [{"index": index, **answer} for index, answer in enumerate(answers) if "error" in answer]
    rows = [row for answer in answers for row in answer.get("rows", ())]
    if len(failed) == len(answers):
        raise EmbedLensError(f"none of {len(answers)} samples could be measured; the first: {failed[0]['error']}")
    if not rows:
        raise EmbedLensError(
            f"the study gave no record for any of {len(answers)} samples: return at least one, or choose samples that "
            "have what it looks for"
        )
    table = pd.DataFrame(rows)
    table.attrs["failed"] = failed
    return table
