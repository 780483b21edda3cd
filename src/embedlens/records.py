"""What is claimed and what was found: `claims.csv`, and `results/<model>/<chapter>.json`.

A record is the same from run to run apart from `machine` and `versions`: no times, no paths, numbers rounded.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from csv import DictReader
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from secrets import token_hex
from typing import Any

from embedlens.book import find_root
from embedlens.errors import EmbedLensError, writing
from embedlens.rules import UNTESTABLE, VERDICTS

DECIMALS = 4


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, as `claims.csv` lists it."""

    id: str
    paper: str
    section: str
    statement: str
    quantity: str
    claimed: str  #: What the paper found
    needs: str
    sentence: str  #: What the paper says, for a reader who does not know its symbols
    headline: str  #: The abstract's own words; empty for what only the text says
    by_construction: str  #: Why no run could refute it, so that it is shown and not counted; empty where one could
    before: str  #: The miniature's verdict by the first rules, before they were changed, where it was another


@dataclass(frozen=True)
class Finding:
    """What a run found about one claim: a number with its interval, and a verdict."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    verdict: str
    note: str
    rule: str = ""  #: What the verdict was judged by, as `embedlens.rules` reads it
    text: str = ""  #: Number and interval as a reader sees them, with their unit

    @property
    def here(self) -> str:
        """Number and interval for tables."""
        if self.value is None or self.low is None or self.high is None:
            return "–"
        return self.text or f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise EmbedLensError(f"unknown verdict {self.verdict!r}: use one of {', '.join(VERDICTS)}")
        if not self.note.strip():
            raise EmbedLensError("the note is empty: say in one sentence what was measured")
        numbers = (self.value, self.low, self.high)
        if self.verdict == UNTESTABLE and numbers == (None, None, None):
            return
        if any(number is None or not math.isfinite(number) for number in numbers):
            raise EmbedLensError(f"a verdict needs a finite value and interval, not {numbers}: mend the measurement")
        if not self.low <= self.value <= self.high:  # type: ignore[operator]  # None is refused above
            raise EmbedLensError(f"the value {self.value} lies outside its interval {self.low} to {self.high}")
        if self.n < 1:
            raise EmbedLensError(f"n is {self.n}: a verdict needs at least one sample")


@dataclass(frozen=True)
class Record:
    """What one run of a chapter found, as it lies in `results/`."""

    model: str
    chapter: str
    n_images: int
    seed: int
    machine: str
    versions: Mapping[str, str]
    claims: Mapping[str, Finding]
    numbers: Mapping[str, float]
    parameters: Mapping[str, str | float] = field(default_factory=dict)

    @property
    def asked(self) -> dict[str, str | float]:
        """Everything that two records of one chapter and model may differ in by intent."""
        return {"n_images": self.n_images, "seed": self.seed, **self.parameters}


@cache
def claims() -> dict[str, Claim]:
    """Every claim of the papers that the book tests, by id.

    >>> claims()["E13"].section
    '3.2'
    """
    text = files("embedlens").joinpath("claims.csv").read_text(encoding="utf-8")
    return {row["id"]: Claim(**row) for row in DictReader(text.splitlines())}


def machine() -> str:
    """What the run ran on, without the machine's name."""
    import torch

    gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, {gpus}"


def results(folder: Path | str | None = None) -> Path:
    """Where records lie: `folder`, else the checkout's own `results` (above the working folder, or above this package),
    else `results` here."""
    if folder:
        return Path(folder).expanduser()
    for start in (Path.cwd(), Path(__file__).parent):
        try:
            return find_root(start) / "results"
        except EmbedLensError:
            continue
    return Path("results")


def main_records(folder: Path | str | None = None) -> list[Path]:
    """The records of a folder of results that pages read; those of runs with other parameters lie beside them."""
    return [file for file in sorted(results(folder).glob("*/*.json")) if "=" not in file.name]


def write(
    folder: Path | str | None,
    model: str,
    chapter: str,
    n_images: int,
    seed: int,
    claims: Mapping[str, Finding],
    numbers: Mapping[str, float],
    **parameters: str | float,
) -> Path:
    """Write `folder/<model>/<chapter>.json` (`folder` as `results` takes it), replacing one of the same parameters:
    what else the chapter was asked for, such as `dataset`. One of other parameters stays; the new one lies beside it,
    named by what differs, and a printed line says so. A quantised model has a folder of its own."""
    content = {
        "model": model,
        "chapter": chapter,
        "n_images": int(n_images),
        "seed": int(seed),
        "parameters": {name: _pathless(value) for name, value in rounded(dict(sorted(parameters.items()))).items()},
        "machine": machine(),
        "versions": versions(),
        "claims": {name: rounded(asdict(claims[name])) for name in sorted(claims)},
        "numbers": rounded(dict(sorted(numbers.items()))),
    }
    main = results(folder) / _folder_of(model) / f"{chapter}.json"
    file = _without_replacing(main, _checked(content, f"{model}/{chapter}"))
    # a disk that fills up must not leave half a record, nor must other processes that write the same
    whole = file.with_name(f"{file.name}.{os.getpid()}-{token_hex(4)}")
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        whole.replace(file)
    if file != main:
        print(f"{main.name} is of other parameters and stays: this run's record is {file.name}, beside it")
    return file


def _without_replacing(main: Path, record: Record) -> Path:
    """`main`, or where a record of other parameters lies there, a name beside it that says what is different."""
    file, named = main, dict[str, str | float]()
    while file.is_file():
        try:
            there = read(file).asked
        except EmbedLensError:  # damaged: nothing to keep
            break
        other = {name: value for name, value in record.asked.items() if there.get(name, value) != value}
        if not other.keys() - named.keys():
            break
        named |= other
        said = re.sub(r"[^\w.,=-]+", "-", ",".join(f"{name}={value}" for name, value in sorted(named.items())))
        file = main.with_name(f"{main.stem}.{said}.json")
    return file


def read(file: Path | str) -> Record:
    """The record in a file; EmbedLensError where it has not the fields, claims and verdicts of one."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EmbedLensError(f"no record at {file}: run the chapter first (embedlens book --refresh)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EmbedLensError(f"{file} is no JSON ({error}): run the chapter again") from None
    return _checked(content, str(file))


def _checked(content: Any, name: str) -> Record:
    names = [field.name for field in fields(Record)]
    if not isinstance(content, dict) or {*content, "parameters"} != set(names):
        raise EmbedLensError(f"{name} does not have the fields {', '.join(names)}: run the chapter again")
    unknown = sorted(set(content["claims"]) - set(claims()))
    if unknown:
        raise EmbedLensError(f"{name} judges {', '.join(unknown)}, which claims.csv does not list: correct the id")
    for key, number in content["numbers"].items():
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise EmbedLensError(f"{name}: the number {key!r} is {number!r}: record a finite number")
    try:
        found = {key: Finding(**entry) for key, entry in content["claims"].items()}
    except TypeError as error:
        raise EmbedLensError(f"{name}: a claim has other fields ({error}): run the chapter again") from None
    return Record(**{**content, "claims": found})


def versions() -> dict[str, str]:
    """Of the packages that a number may depend on; 2.13.0+cpu and 2.13.0+cu130 are one."""
    return {package: version(package).split("+")[0] for package in ("torch", "transformers", "numpy")}


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain Python values, floats with DECIMALS decimals: the last bits belong to the machine."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in values.items()}
    return {key: round(value, DECIMALS) if isinstance(value, float) else value for key, value in plain.items()}


def _pathless(value: Any) -> Any:
    """
    >>> _pathless("coco:/data/coco/val2017")
    'coco:val2017'
    """
    return re.sub(r"[^:]*/(?=[^/])", "", value.rstrip("/")) if isinstance(value, str) else value


def _folder_of(model: str) -> str:
    """One folder name per model: a repository id keeps its owner, a path only its last part.

    >>> [_folder_of(name) for name in ("llava-hf/llava-1.5-7b-hf@4bit", "/data/checkpoints/mine")]
    ['llava-hf--llava-1.5-7b-hf@4bit', 'mine']
    """
    parts = [part for part in model.split("/") if part]
    return "--".join(parts) if len(parts) == 2 and not model.startswith(("/", ".", "~")) else parts[-1]
