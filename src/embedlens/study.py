"""One study over many pictures: `run(study, model, samples)` → a table, resumable, in one process or several.

A study is a function (model, sample) → one flat record, or several: one per token, layer or question. Everything a
study finds goes to disk picture by picture, so memory does not grow with the pictures' content and a run that was
killed goes on where it stopped.

Files of a run: `<out>/run-<call>.process-<rank>.jsonl`, new ones for every call, never written to again. First line:
what was run on what. Then one line per sample: its number in the order of `samples`, its id, a digest of its
annotations, the size of its batch, its rows or its error. A line counts only when it is whole, so a file may end
anywhere.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from embedlens import memory
from embedlens.errors import EmbedLensError, writing
from embedlens.samples import Sample
from embedlens.vlm import VisionLanguageModel

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1  # of the files; one that means something else by the same keys gets another number
SAMPLED = 64  # values of each weight that enter the model's fingerprint
WHOLE = 2**20  # arrays up to this many values are digested whole, larger ones by as many values, evenly spread
DEPTH = 6  # how deep parameters may nest before they count as having no name
AUTO = "auto"
LARGEST = 64  # samples in a batch that "auto" tries first on a GPU
ALONE = "run `unset WORLD_SIZE` to work in one process, or start several with accelerate launch or torchrun"
ON_CPU = 8  # samples in a batch that "auto" takes on a CPU, where running out of memory ends the process
Scalar = str | int | float | bool | None


def run(
    study: Callable[..., Any],
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    out: str | Path | None = None,
    batch_size: int | str | None = None,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Run a study on every sample; one row per record it gives.

    Where `accelerate launch` or torchrun started several processes, the batches are dealt out to them; each writes its
    own files and all return the same table. Load the model on `accelerate.PartialState().device` then; without a GPU
    use torchrun, because `accelerate launch --cpu` starts one process only.

    A sample that raises EmbedLensError or OSError (a damaged picture) is recorded with the reason and left out of
    the table; one warning at the end says how many, `table.attrs["failed"]` which. Calling again tries them again.
    Any other exception is a bug of the study and is raised at once; what was measured before stays on disk.

    Args:
        study: (model, sample) → a flat record {name: number, text, bool or None}, or several. With `batch_size` it
            gets a list of samples and gives, for each, its record or records. What else it needs is bound with
            `functools.partial` and is part of what identifies the run; globals it reads are not.
        model: from `embedlens.load`.
        samples: any iterable; read once, a batch at a time. Pictures that the study opens are let go.
        out: a folder, for this study and these samples alone; a call that finds rows of the same study there goes on
            from them. None keeps nothing. Processes on several machines need a folder that all of them see.
        batch_size: samples at a time; batches are the same whatever the number of processes. "auto": as many as fit,
            found by halving from 64 on a GPU, 8 on a CPU; a resumed run keeps what it began with. A batch that does
            not fit after all is measured in halves.
        progress: show a bar on stderr; None: if that is a terminal.

    Returns:
        The rows in the order of the samples. Column `id`, the sample's, comes first unless the study writes its own.

    Raises:
        EmbedLensError: no samples, all failed, no rows at all, a record that is not flat, or `out` holds rows of
            another study, model, batch size or of other samples.

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
    processes = _processes(model.device.type)
    with _folder(out, processes) as folder:
        if isinstance(batch_size, str):
            stream = iter(samples)
            first = list(islice(stream, LARGEST))
            samples = samples if isinstance(samples, Sized) else chain(first, stream)
            batch_size = _begun_with(folder) or processes.least(fitting_batch_size(study, model, first))
            processes.wait()  # nobody writes before everybody has seen what the folder held
        header = _header(study, model, batch_size, named=out is not None)
        records = _Records.read(folder, header)
        processes.wait()  # nobody writes before everybody has read
        count = _measure(study, model, samples, records, header, processes, batch_size, progress)
        processes.wait()  # nobody reads before everybody has written
        records = _Records.read(folder, header)
        found = records.table(count)
        processes.wait()  # the folder may go now
    failed = found.attrs["failed"]
    if failed and processes.rank == 0:
        first = failed[0]
        warnings.warn(
            f"{len(failed)} of {count} samples could not be measured and are not in the table; "
            f"the first is sample {first['id']}: {first['error']}",
            stacklevel=2,
        )
    return found


def fitting_batch_size(study: Callable[..., Any], model: VisionLanguageModel, samples: Sequence[Sample]) -> int:
    """The largest power of two up to 64, or the number of samples, at which a batch fits into memory.

    The study is run on the first samples and what it gives is thrown away. A CPU is not tried but given 8: where its
    memory runs out, nothing is raised that could be caught.

    Raises:
        EmbedLensError: not even one sample fits.
    """
    if not len(samples):
        raise EmbedLensError("no samples: pass at least one")
    if model.device.type == "cpu":
        return ON_CPU
    size = LARGEST
    while size > len(samples):
        size //= 2
    while size:
        try:
            study(model, [replace(sample) for sample in samples[:size]])
        except (EmbedLensError, OSError):
            return size  # a damaged picture, which the run records
        except (RuntimeError, MemoryError) as error:
            if not memory.out_of_memory(error):
                raise
        else:
            return size
        memory.release()
        size //= 2
    raise EmbedLensError(_too_little(model))


def rehearse(
    study: Callable[..., Any], model: VisionLanguageModel, samples: Sequence[Sample], batch_size: int | None
) -> float:
    """Seconds that one sample takes here: the first batch, measured the second time it is run.

    What it gives is thrown away. Samples differ, and so do processes that share a machine: it is an estimate.
    """
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


def own_device() -> str | None:
    """Where this process loads its model: its own GPU where a launcher started several processes; None: `load` chooses.

    Without a GPU all processes share the CPU.

    >>> own_device() is None
    True
    """
    if _launched() == 1:
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def meet(device: str) -> tuple[int, int]:
    """(rank, number) of the processes that a launcher started; to be called before a model is loaded.

    Loading may make accelerate look at the machine by itself, and without a GPU it then takes each for a single one.

    Args:
        device: kind of device that their models go to, "cpu" or "cuda".
    """
    processes = _processes(device)
    return processes.rank, processes.count


def _begun_with(folder: Path) -> int | None:
    """The batch size of the rows that a folder holds, which resuming keeps."""
    for path in sorted(folder.glob("run-*.process-*.jsonl"), key=_call_and_rank):
        for _, header in _lines(path):
            return header.get("batch_size")
    return None


def _too_little(model: VisionLanguageModel) -> str:
    return (
        f"{model.device} has too little memory for one sample of this study: load the model with quantize='4bit', "
        "dtype='bfloat16' or, with several GPUs, device='auto'"
    )


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(
    study: Callable[..., Any],
    model: VisionLanguageModel,
    samples: Iterable[Sample],
    records: _Records,
    header: dict[str, Any],
    processes: _Processes,
    batch_size: int | None,
    progress: bool | None,
) -> int:
    """Run what is not on disk yet and is this process's share; how many samples there are in all."""
    from tqdm import tqdm

    total = len(samples) if isinstance(samples, Sized) else None
    hidden = True if processes.rank != 0 else (None if progress is None else not progress)
    shard = _Shard(records.next_file(processes.rank), header)
    count = 0
    with shard, tqdm(total=total, disable=hidden, unit="sample", leave=False) as bar:
        for number, batch in enumerate(_batches(samples, batch_size or 1)):
            marks = [_mark(sample) for sample in batch]
            indices = range(count, count + len(batch))
            done = [
                records.holds(i, mark, len(batch), sample.id)
                for i, mark, sample in zip(indices, marks, batch, strict=True)
            ]
            # a batch is measured whole or not at all: in another company a sample's last bits may differ
            if not all(done) and number % processes.count == processes.rank:
                for i, mark, sample, answer in zip(
                    indices, marks, batch, _answers(study, model, batch, batch_size), strict=True
                ):
                    shard.write({"index": i, "id": sample.id, "mark": mark, "batch": len(batch), **answer})
            count += len(batch)
            bar.update(len(batch))
    if count == 0:
        raise EmbedLensError("no samples: pass at least one")
    return count


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Samples that let go of the pictures they open: a list of them must not fill up with decoded pictures."""
    stream = iter(samples)
    while batch := list(islice(stream, size)):
        yield [sample if "image" in vars(sample) else replace(sample) for sample in batch]


def _answers(
    study: Callable[..., Any], model: VisionLanguageModel, batch: list[Sample], batch_size: int | None
) -> list[dict[str, Any]]:
    """For each sample {"rows": its rows} or {"error": why there are none}."""
    too_large = False
    try:
        given = study(model, batch[0]) if batch_size is None else study(model, batch)
        if batch_size is None:
            given = [_listed(given)]
        elif isinstance(given, Iterable) and not isinstance(given, (str, Mapping)):
            given = [_listed(rows) for rows in given]
    except (EmbedLensError, OSError) as error:
        if len(batch) == 1:
            return [{"error": _sentence(error)}]
        return [answer for sample in batch for answer in _answers(study, model, [sample], batch_size)]
    except (RuntimeError, MemoryError) as error:
        too_large = memory.out_of_memory(error)
        if not too_large:
            raise
    if too_large:  # out of the clause, whose traceback holds what filled the memory
        memory.release()
        if len(batch) == 1:
            return [{"error": _too_little(model)}]
        halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]
        return [answer for half in halves for answer in _answers(study, model, half, batch_size)]
    if not isinstance(given, list) or len(given) != len(batch):
        what = f"{len(given)} results" if isinstance(given, list) else _kind(given)
        raise EmbedLensError(
            f"the study gave {what} for a batch of {len(batch)} samples: with batch_size it returns a list with one "
            "record, or one list of records, per sample"
        )
    return [{"rows": _rows(rows, sample)} for rows, sample in zip(given, batch, strict=True)]


def _listed(given: Any) -> Any:
    """Several records, read to the end (a study may be a generator); anything else as it is, for `_rows` to refuse."""
    if isinstance(given, Mapping):
        return [given]
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else given


def _rows(given: Any, sample: Sample) -> list[dict[str, Scalar]]:
    wrong = [entry for entry in given if not isinstance(entry, Mapping)] if isinstance(given, list) else [given]
    if wrong:
        raise EmbedLensError(
            f"the study gave {_kind(wrong[0])} for sample {sample.id}: return one record (a dict) or a list of records"
        )
    rows = [{str(name): _plain(value, str(name)) for name, value in row.items()} for row in given]
    return [row if "id" in row else {"id": sample.id, **row} for row in rows]


def _plain(value: Any, name: str) -> Scalar:
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


# --- rows on disk ----------------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    """Where the line of a sample is, and what a second call must know of it."""

    file: Path
    offset: int
    mark: str
    id: int
    batch: int
    failed: bool


@dataclass(frozen=True)
class _Records:
    """What the files of a folder hold: the latest whole line of each sample."""

    folder: Path
    latest: dict[int, _Record]
    call: int
    """Number of the next call's files."""

    @classmethod
    def read(cls, folder: Path, header: Mapping[str, Any]) -> _Records:
        latest: dict[int, _Record] = {}
        paths = sorted(folder.glob("run-*.process-*.jsonl"), key=_call_and_rank)
        for path in paths:
            for offset, line in _lines(path):
                if offset == 0:
                    _check_header(line, header, folder)
                else:
                    latest[line["index"]] = _Record(
                        path, offset, line["mark"], line["id"], line["batch"], "error" in line
                    )
        return cls(folder, latest, 1 + max((_call_and_rank(path)[0] for path in paths), default=0))

    def next_file(self, rank: int) -> Path:
        return self.folder / f"run-{self.call}.process-{rank}.jsonl"

    def holds(self, index: int, mark: str, batch: int, id: int) -> bool:
        """Whether the sample is measured.

        Raises:
            EmbedLensError: another sample was measured in its place.
        """
        record = self.latest.get(index)
        if record is None:
            return False
        if record.mark != mark:
            which = f"id {record.id}" if record.id != id else "the same id but other annotations"
            raise EmbedLensError(
                f"{self.folder} holds rows of other samples: number {index} had {which}, now it is id {id}; pass the "
                "same samples in the same order, or another out"
            )
        return record.batch == batch and not record.failed

    def table(self, count: int) -> pd.DataFrame:
        """The rows of samples 0 to `count` - 1, and in `attrs["failed"]` those that have none."""
        import pandas as pd

        absent = [index for index in range(count) if index not in self.latest]
        if absent:
            raise EmbedLensError(
                f"{self.folder} lacks {len(absent)} of {count} samples after the run: give every process the same "
                "samples and a folder that all of them see"
            )
        columns: dict[str, list[Any]] = {}
        failed: list[dict[str, Any]] = []
        length = 0
        for line in self._in_order(count):
            if "error" in line:
                failed.append({name: line[name] for name in ("index", "id", "error")})
            for row in line.get("rows", ()):
                for name, value in row.items():
                    columns.setdefault(name, [math.nan] * length).append(value)
                length += 1
                for column in columns.values():
                    if len(column) < length:
                        column.append(math.nan)  # this record has no such value
        if len(failed) == count:
            raise EmbedLensError(f"none of {count} samples could be measured; the first: {failed[0]['error']}")
        if not length:
            raise EmbedLensError(
                f"the study gave no record for any of {count} samples: return at least one, or choose samples that "
                "have what it looks for"
            )
        table = pd.DataFrame(columns)
        table.attrs["failed"] = failed
        return table

    def _in_order(self, count: int) -> Iterator[dict[str, Any]]:
        open_files: dict[Path, IO[bytes]] = {}
        try:
            for index in range(count):
                record = self.latest[index]
                if record.file not in open_files:
                    open_files[record.file] = record.file.open("rb")
                open_files[record.file].seek(record.offset)
                yield json.loads(open_files[record.file].readline())
        finally:
            for file in open_files.values():
                file.close()


def _call_and_rank(path: Path) -> tuple[int, int]:
    call, rank = (part.rpartition("-")[2] for part in path.stem.split("."))
    return (int(call), int(rank)) if call.isdecimal() and rank.isdecimal() else (0, 0)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole lines with their offsets; a file ends where a killed process stopped writing, mid-line or not."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                content = json.loads(line)
            except ValueError:  # what a power cut leaves; from here on everything is measured again
                return
            yield offset, content
            offset += len(line)


class _Shard:
    """The file that one process writes in one call; made with the first line, so that idle calls leave none."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path, self._header = path, header
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, raised: object, *_: object) -> None:
        if self._file is None:
            return
        try:
            with writing(self._path):
                self._file.flush()
                os.fsync(self._file.fileno())
        except EmbedLensError:
            if raised is None:  # else it is the same refusal once more
                raise
        finally:
            with suppress(OSError):  # a line that did not fit does not fit now either
                self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            with writing(self._path):
                try:
                    self._file = self._path.open("xb")
                except FileExistsError:
                    raise EmbedLensError(
                        f"another run is writing to {self._path.parent}: wait for it, or pass another out"
                    ) from None
            self._put(self._header)
        self._put(line)

    def _put(self, content: Mapping[str, Any]) -> None:
        assert self._file is not None
        with writing(self._path):
            self._file.write(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._file.flush()  # out of this process, so killing it loses nothing; on leaving, the disk has it


@contextmanager
def _folder(out: str | Path | None, processes: _Processes) -> Iterator[Path]:
    """The folder of the run's files; without `out` one that goes with the table's return."""
    if out is not None:
        folder = Path(out).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EmbedLensError(f"out={str(out)!r} cannot be a folder ({error}): pass another path") from None
        yield folder
        return
    made = tempfile.mkdtemp(prefix="embedlens-") if processes.rank == 0 else ""
    folder = Path(processes.agreed(made))
    try:
        yield folder
    finally:
        if processes.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


# --- several processes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Processes:
    """How many run this together, and which of them this is."""

    rank: int = 0
    count: int = 1

    def wait(self) -> None:
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def agreed(self, value: str) -> str:
        """The value of rank 0."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]

    def least(self, value: int) -> int:
        """The smallest value of any process."""
        if self.count == 1:
            return value
        from accelerate.utils import gather_object

        return min(gather_object([value]))


def _met() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _launched() -> int:
    """How many processes there are by what a launcher left in the environment, in this run or in an earlier one.

    Raises:
        EmbedLensError: it left too little for them to meet.
    """
    names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
    said, rank, host, port = (os.environ.get(name, "") for name in names)
    if said in ("", "1"):
        return 1
    whole = said.isdecimal() and rank.isdecimal() and int(rank) < int(said) and host and port
    if not whole and not _met():
        raise EmbedLensError(
            f"WORLD_SIZE={said} is in the environment without a RANK below it, MASTER_ADDR and MASTER_PORT: {ALONE}"
        )
    return int(said)


def _processes(device: str) -> _Processes:
    """This process alone, unless a launcher started several, for models on this kind of device."""
    launched = _launched()
    if launched == 1 and not _met():
        return _Processes()
    try:
        from accelerate import PartialState
    except ImportError:
        raise EmbedLensError(
            f"{launched} processes were launched, and dealing out the samples needs accelerate: pip install "
            "accelerate, or start one process"
        ) from None
    try:
        state = PartialState(cpu=device == "cpu")  # told nothing, it takes processes without a GPU for single ones
    except (ValueError, RuntimeError) as error:  # of torch.distributed: a rank that is none, nobody to meet
        why = " ".join(str(error).split())
        raise EmbedLensError(f"WORLD_SIZE={launched}, but the processes cannot meet ({why}): {ALONE}") from error
    if state.num_processes < launched:
        raise EmbedLensError(
            f"{launched} processes were launched but accelerate knows of {state.num_processes}: where the model is on "
            "the CPU, make accelerate.PartialState(cpu=True) before anything else of accelerate, or let run make it"
        )
    return _Processes(state.process_index, state.num_processes)


# --- what was run on what --------------------------------------------------------------------------------------------


def _header(study: Callable[..., Any], model: Any, batch_size: int | None, named: bool) -> dict[str, Any]:
    """What makes rows comparable. Without a folder to resume from (`named` False) nothing is compared."""
    header: dict[str, Any] = {"format": FORMAT, "batch_size": batch_size}
    if not named:
        return header
    return header | _study_identity(study) | _model_identity(model)


def _check_header(found: Mapping[str, Any], header: Mapping[str, Any], folder: Path) -> None:
    other = [name for name in {**header, **found} if found.get(name) != header.get(name)]
    if not other:
        return
    name = other[0]
    said = {"code": "study (its code has changed)", "weights": "model (its weights differ)"}.get(name)
    said = said or f"{name} ({_short(found.get(name))} there, {_short(header.get(name))} here)"
    raise EmbedLensError(
        f"{folder} holds rows of another {said}: pass another out, delete that folder, or run what it was made with"
    )


def _study_identity(study: Callable[..., Any]) -> dict[str, Any]:
    bound: dict[str, Any] = {}
    function = study
    while isinstance(function, functools.partial):
        bound = {**{f"argument {i}": value for i, value in enumerate(function.args)}, **function.keywords, **bound}
        function = function.func
    if not hasattr(function, "__qualname__"):  # an object with __call__: its fields are its parameters
        return {
            "study": _qualname(type(function)),
            "parameters": {"self": _identity(function, "self")} | _named(bound),
            "code": _code(type(function)),
        }
    if inspect.ismethod(function):
        bound = {"self": function.__self__, **bound}
        function = function.__func__
    function = inspect.unwrap(function)  # what a decorator keeps for itself is no parameter
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not parameter.empty
    }
    enclosed = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    return {
        "study": _qualname(function),
        "parameters": _named({**enclosed, **defaults, **bound}),
        "code": _code(function),
    }


def _named(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _identity(value, name) for name, value in parameters.items()}


def _qualname(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _code(thing: Any) -> str:
    """Digest of the source without its comments and spacing; empty where there is no source to read."""
    try:
        source = textwrap.dedent(inspect.getsource(thing))
    except (OSError, TypeError):
        return ""
    try:
        source = ast.unparse(ast.parse(source))
    except SyntaxError:  # a lambda in the middle of an expression
        pass
    return _digest(source)


def _model_identity(model: Any) -> dict[str, Any]:
    return {
        "model": str(model.name),
        "class": type(model.hf).__name__,
        "dtype": str(model.hf.dtype),
        "preprocessing": model.preprocessing,
        "weights": _weights(model.hf),
    }


def _weights(module: nn.Module) -> str:
    """Digest of names, shapes and a few values of every weight: cheap, and training changes them all."""
    named = chain(module.named_parameters(), module.named_buffers())
    parts = [f"{name} {_array_identity(tensor, SAMPLED)}" for name, tensor in named]
    return _digest("\n".join(parts))


def _array_identity(values: Tensor, most: int) -> str:
    values = values.detach()
    seen = ""
    if not values.is_meta and values.numel():
        spread = values.reshape(-1)[:: -(-values.numel() // most)].cpu()
        seen = _digest((spread.double() if spread.is_floating_point() else spread).numpy().tobytes())
    return f"{values.dtype} {tuple(values.shape)} {seen}"


def _identity(value: Any, name: str, depth: int = 0) -> Any:
    """What a parameter is, the same in every process and on every day; long ones as a digest."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return repr(value)  # nan equals itself then
    if isinstance(value, (np.generic, np.ndarray)):
        value = np.asarray(value)
        return f"{value.dtype} {value.shape} {_digest(np.ascontiguousarray(value).tobytes())}"
    if isinstance(value, Tensor):
        return _array_identity(value, WHOLE)
    if isinstance(value, nn.Module):
        return f"{_qualname(type(value))} {_weights(value)}"
    if isinstance(value, (os.PathLike, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, type) or inspect.isroutine(value):
        return _qualname(value)
    if depth < DEPTH:
        if isinstance(value, functools.partial):
            value = {"function": value.func, "arguments": value.args, **value.keywords}
        if isinstance(value, Mapping):
            return _compact({str(key): _identity(entry, name, depth + 1) for key, entry in value.items()})
        if isinstance(value, (set, frozenset)):
            return _compact(sorted(json.dumps(_identity(entry, name, depth + 1)) for entry in value))
        if isinstance(value, Sequence):
            return _compact([_identity(entry, name, depth + 1) for entry in value])
        if isinstance(value, VisionLanguageModel):
            return _compact(_model_identity(value))
        if is_dataclass(value):
            parts = {field.name: getattr(value, field.name) for field in fields(value)}
            return _compact([_qualname(type(value)), _identity(parts, name, depth + 1)])
        if getattr(value, "__dict__", None):
            return _compact([_qualname(type(value)), _identity(vars(value), name, depth + 1)])
    raise EmbedLensError(
        f"the study's parameter {name!r} is {_kind(value)}, which cannot be told from another on resuming: bind "
        "numbers, texts, arrays or frozen dataclasses of these, or leave out=None"
    )


def _compact(value: Any) -> Any:
    text = json.dumps(value, sort_keys=True)
    return value if len(text) <= 200 else _digest(text)


def _mark(sample: Sample) -> str:
    """Digest of all that is known about a sample but its pixels, which would have to be read."""
    known = (sample.id, sample.width, sample.height, sample.annotations, sample.captions, sample.questions)
    return _digest(json.dumps(known, sort_keys=True, default=_plain_parts))


def _plain_parts(value: Any) -> Any:
    return getattr(value, "__dict__", None) or str(value)


def _digest(content: str | bytes) -> str:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"
