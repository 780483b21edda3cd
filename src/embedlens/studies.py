"""The studies that `embedlens run` knows by name, and the run itself: estimates first, then the table, then the record.

Every launched process calls `run_named`; the first one speaks and writes.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedlens import memory, processes, records, samples, study, sweep, tasks
from embedlens.errors import EmbedLensError, writing
from embedlens.loading import load
from embedlens.measures import anatomy
from embedlens.model_names import MINIATURE, signed

if TYPE_CHECKING:
    import pandas as pd

LONG = 50  # from so many pictures on, time is estimated before the run


@dataclass(frozen=True)
class Named:
    """What `embedlens run` knows by name: chapter 09, or the questions of all families under some arms."""

    about: str  #: What it is and whether a record comes of it; `embedlens run --help` says the same
    arms: Callable[[], list[sweep.Arm]] | None = None  #: None: chapter 09, which writes a record


STUDIES: Mapping[str, Named] = {
    "other_models": Named("clusters and token groups of one model; the whole of chapter 09, whose record it writes"),
    "sinks": Named("the arms of Table 1; a part of chapter 03, whose notebook writes the record", sweep.sink_arms),
    "dead": Named("the arms of Table 2; a part of chapter 04, whose notebook writes the record", sweep.dead_arms),
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

    The rows and `table.csv` go to `out`, by default `runs/<model>/<study>`; calling again goes on where a run stopped.
    The record goes to `results`, by default the checkout's own, as `records.results` finds it.
    """
    named = STUDIES.get(name)
    function = None if named else own_study(name)
    if named is not None and named.arms is not None and dataset != "miniworld":
        raise EmbedLensError(
            f"dataset={dataset!r} has no questions to answer: leave it out, the arms are asked about drawn pictures; "
            "published benchmarks run through lmms-eval"
        )
    if n < 1:
        raise EmbedLensError(f"n is {n}: pass at least one picture")
    place, device = processes.own_device(), processes.placed(device)
    if place is not None and os.environ.get("RANK") == "0":  # what an earlier launcher left would wait for half an hour
        say(f"waiting for all processes of WORLD_SIZE={os.environ['WORLD_SIZE']}; if there are none, {processes.ALONE}")
    together = processes.processes("cpu" if device == "cpu" or (place or "cpu") == "cpu" else "cuda")
    aloud: Callable[[str], object] = say if together.rank == 0 else (lambda line: None)
    several = "es" * (together.count > 1)
    aloud(f"{name} on {model}: {n} pictures of {dataset}, seed {seed}, {together.count} process{several}")
    aloud(memory.foretold(model, device, dtype, quantize, batch_size if isinstance(batch_size, int) else 1))
    loaded = load(model, device=device, dtype=dtype, quantize=quantize, preprocessing=preprocessing)
    # a quantised model, or one that reads pictures in a way that is not its own, is another model: nothing is mixed
    measured_as = signed(loaded.name, None if preprocessing == loaded.family.PREPROCESSINGS[0] else preprocessing)
    own_folder = Path("runs") / measured_as.strip("/").replace("/", "--") / name.replace(":", ".")
    out = own_folder if out is None else Path(out)
    if named is not None and named.arms is not None:
        items = [item for family in tasks.FAMILIES for item in tasks.family_questions(family, n, seed)]
        size: dict[str, Any] = {"batch_size": batch_size} if isinstance(batch_size, int) else {}
        table = sweep.run_arms(loaded, items, named.arms(), **size, out=out)
    else:
        if named is not None:
            measured, calibration, compared = anatomy.pictures(dataset, n, seed)
            function = anatomy.study_of(loaded, calibration, compared, seed)
        else:
            measured = samples.load(dataset, n=n, seed=seed)
            batch_size = None if batch_size == study.AUTO else batch_size
        assert function is not None
        if len(measured) >= LONG:
            trial = study.ON_CPU if isinstance(batch_size, str) else batch_size
            seconds = study.rehearse(function, loaded, measured, trial)
            whole = timedelta(seconds=round(seconds * len(measured) / together.count))
            aloud(f"time: about {whole} ({seconds:.2g} s a picture in a first batch, on this machine)")
        table = study.run(function, loaded, measured, out, batch_size)
    if together.rank == 0:
        with writing(out / "table.csv"):
            out.mkdir(parents=True, exist_ok=True)
            table.to_csv(out / "table.csv", index=False)
        aloud(f"{len(table)} rows in {out / 'table.csv'}")
        if name == "other_models":
            found = anatomy.numbers(table, dataset != "miniworld", seed)
            folder = records.results(results)
            file = records.write(folder, measured_as, anatomy.CHAPTER, len(table), seed, {}, found, dataset=dataset)
            aloud(f"record: {file}")
        elif named is not None:
            aloud(f"no record: {name} is {named.about}")
    return table
