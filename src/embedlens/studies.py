"""The studies that `embedlens run` knows by name, and the run itself: estimates first, then the table, then the record.

Every process of `accelerate launch -m embedlens run …` calls `run_named`; they share the pictures, and the first one
speaks and writes.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedlens import memory, processes, records, samples, study
from embedlens.errors import EmbedLensError, writing
from embedlens.loading import load
from embedlens.measures import anatomy
from embedlens.model_names import MINIATURE, signed
from embedlens.vlm import VisionLanguageModel

if TYPE_CHECKING:
    import pandas as pd

    from embedlens.samples import Sample

LONG = 50  # from so many pictures on, time is estimated before the run
Prepared = tuple[Callable[..., Any], "list[Sample]"]


@dataclass(frozen=True)
class Named:
    """A study with its pictures, and what is written of its table."""

    about: str  #: What it is and whether a record comes of it; `embedlens run --help` says the same
    #: (model, dataset, n, seed) → the study, taking a batch, and the samples to run it on
    prepare: Callable[[VisionLanguageModel, str, int, int], Prepared]
    #: (results, model, dataset, table, seed) → the record that a chapter reads; None: the table is all
    record: Callable[[Path, str, str, pd.DataFrame, int], Path] | None = None


def _anatomy(model: VisionLanguageModel, dataset: str, n: int, seed: int) -> Prepared:
    measured, calibration, compared = anatomy.pictures(dataset, n, seed)
    return anatomy.study_of(model, calibration, compared, seed), measured


def _anatomy_record(folder: Path, model: str, dataset: str, table: pd.DataFrame, seed: int) -> Path:
    found = anatomy.numbers(table, dataset != "miniworld", seed)
    return records.write(folder, model, anatomy.CHAPTER, len(table), seed, {}, found, dataset=dataset)


def _arms(model: VisionLanguageModel, dataset: str, n: int, seed: int, arms: str) -> Prepared:
    from embedlens import sweep, tasks

    if dataset != "miniworld":
        raise EmbedLensError(
            f"dataset={dataset!r} has no questions to answer: leave it out, the arms are asked about drawn pictures; "
            "published benchmarks run through lmms-eval"
        )
    items = [item for family in tasks.FAMILIES for item in tasks.family_questions(family, n, seed)]
    return partial(sweep.answer_arms, arms=getattr(sweep, arms)()), sweep.asked(items)


STUDIES: Mapping[str, Named] = {
    "other_models": Named(
        "clusters and token groups of one model; the whole of chapter 09, whose record it writes",
        _anatomy,
        _anatomy_record,
    ),
    "sinks": Named(
        "the arms of Table 1; a part of chapter 03, whose notebook writes the record", partial(_arms, arms="sink_arms")
    ),
    "dead": Named(
        "the arms of Table 2; a part of chapter 04, whose notebook writes the record", partial(_arms, arms="dead_arms")
    ),
}


def own_study(name: str) -> Callable[..., Any]:
    """A study of the reader's own, `module:function`, found from the working folder on.

    >>> own_study("json:dumps").__name__
    'dumps'
    """
    module, separator, function = name.partition(":")
    if not separator:
        raise EmbedLensError(f"no study {name!r}: choose {', '.join(STUDIES)}, or name your own as module:function")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise EmbedLensError(f"no module {error.name!r} for the study {name}: run this where it lies") from None
    if not callable(found):
        raise EmbedLensError(f"{module} has no function {function!r}: name one that takes (model, sample)")
    return found


def run_named(
    name: str,
    model: str = MINIATURE,
    dataset: str = "miniworld",
    n: int = 200,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    preprocessing: str | None = None,
    batch_size: int | str | None = "auto",
    out: Path | str | None = None,
    results: Path | str | None = None,
    say: Callable[[str], object] = print,
) -> pd.DataFrame:
    """Run a study on `n` pictures in as many processes as a launcher started, and write what it found.

    Says beforehand what it will run on and what memory and time that is estimated to take. The rows and `table.csv`
    go to `out`, by default `runs/<model>/<study>`; calling again goes on where a run stopped. The record goes to
    `results`, by default the checkout's own, as `records.results` finds it.
    """
    named = STUDIES.get(name)
    function = None if named else own_study(name)
    if n < 1:
        raise EmbedLensError(f"n is {n}: pass at least one picture")
    place = processes.own_device()
    if place is not None and device == "auto":
        raise EmbedLensError(processes.SPREAD)
    if place is not None and device in (None, "cuda"):
        device = place
    if place is not None and os.environ.get("RANK") == "0":  # what an earlier launcher left would wait for half an hour
        say(f"waiting for all processes of WORLD_SIZE={os.environ['WORLD_SIZE']}; if there are none, {processes.ALONE}")
    together = processes.processes("cpu" if device == "cpu" or (place or "cpu") == "cpu" else "cuda")
    aloud: Callable[[str], object] = say if together.rank == 0 else (lambda line: None)
    several = "es" * (together.count > 1)
    aloud(f"{name} on {model}: {n} pictures of {dataset}, seed {seed}, {together.count} process{several}")
    aloud(memory.foretold(model, device, dtype, quantize, batch_size if isinstance(batch_size, int) else 1))
    loaded = load(model, device=device, dtype=dtype, quantize=quantize, preprocessing=preprocessing)
    if named is not None:
        function, measured = named.prepare(loaded, dataset, n, seed)
    else:
        measured = samples.load(dataset, n=n, seed=seed)
        batch_size = None if batch_size == study.AUTO else batch_size
    assert function is not None
    if len(measured) >= LONG:
        trial = study.ON_CPU if isinstance(batch_size, str) else batch_size
        seconds = study.rehearse(function, loaded, measured, trial)
        whole = seconds * len(measured) / together.count
        aloud(f"time: about {_duration(whole)} ({seconds:.2g} s a picture in a first batch, on this machine)")
    # a quantised model, or one that reads pictures in a way that is not its own, is another model: nothing is mixed
    measured_as = signed(loaded.name, None if preprocessing == loaded.family.PREPROCESSINGS[0] else preprocessing)
    own_folder = Path("runs") / measured_as.strip("/").replace("/", "--") / name.replace(":", ".")
    out = own_folder if out is None else Path(out)
    table = study.run(function, loaded, measured, out, batch_size, progress=None)
    if together.rank == 0:
        with writing(out / "table.csv"):
            table.to_csv(out / "table.csv", index=False)
        aloud(f"{len(table)} rows in {out / 'table.csv'}")
        if named is not None and named.record is not None:
            aloud(f"record: {named.record(records.results(results), measured_as, dataset, table, seed)}")
        elif named is not None:
            aloud(f"no record: {name} is {named.about}")
    return table


def _duration(seconds: float) -> str:
    """
    >>> _duration(40), _duration(5400)
    ('40 s', '1.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
