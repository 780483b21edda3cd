"""The papers' claims, and what a chapter found about them: `results/<model>/<chapter>.json`.

A record is the same from run to run apart from `machine` and `versions`: no times, no paths, numbers rounded.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping
from csv import DictReader
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embedlens import rules
from embedlens.book import find_root
from embedlens.errors import EmbedLensError, writing
from embedlens.intervals import Interval
from embedlens.model_names import MINIATURE, unsigned
from embedlens.rules import FAILS, HOLDS, PARTLY, UNDECIDED, UNTESTABLE, VERDICTS
from embedlens.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

UNMEASURED = "not measured yet"
PACKAGES = ("torch", "transformers", "numpy")  # whose versions a number may depend on
DECIMALS = 4
FIELDS = ("model", "chapter", "n_images", "seed", "parameters", "machine", "versions", "claims", "numbers")


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, as `claims.csv` lists it."""

    id: str
    paper: str
    section: str
    statement: str
    quantity: str
    claimed: str
    """What the paper found."""
    needs: str


@dataclass(frozen=True)
class Finding:
    """What a run found about one claim: a number with its interval, and a verdict.

    >>> Finding(0.93, 0.92, 0.94, n=200, verdict="holds", note="Dead tokens are a third of all.").verdict
    'holds'
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    verdict: str
    note: str
    """One sentence."""
    rule: str = ""
    """What the verdict was judged by, as `embedlens.rules` reads it."""
    text: str = ""
    """Number and interval as a reader sees them, with their unit."""

    @property
    def here(self) -> str:
        """Number and interval for tables.

        >>> Finding(0.93, 0.92, 0.94, 200, "holds", "Of all.", text="93 % (92–94)").here
        '93 % (92–94)'
        """
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
            raise EmbedLensError(
                f"a verdict needs a finite value with its interval, not {numbers}: mend the measurement"
            )
        if not self.low <= self.value <= self.high:  # type: ignore[operator]  # None is refused above
            raise EmbedLensError(f"the value {self.value} lies outside its interval {self.low} to {self.high}")
        if self.n < 1:
            raise EmbedLensError(f"n is {self.n}: a verdict needs at least one sample")

    @classmethod
    def of(cls, found: Interval | None, n: int, verdict: str, note: str) -> Finding:
        """A finding with its interval; what cannot be tested keeps no number, and None cannot be tested.

        >>> Finding.of(None, 40, "holds", "No picture has dead tokens.").verdict
        'not testable here'
        """
        if found is None or verdict == UNTESTABLE:
            return cls(None, None, None, n, UNTESTABLE, note)
        value, low, high = (float(part) for part in found)
        return cls(value, low, high, n, verdict, note)


class Chapter:
    """What one run of a chapter finds: verdicts as they are judged, numbers, and at its end the record.

        chapter = Chapter("05_alive_sparsity", vlm.name, n_images, seed, dataset=dataset)
        chapter.judge("E40", "rise > 0 and doubled > 0", shown=rise, unit="+.1f points", rise=rise, doubled=doubled)
        chapter.sign_off(out)

    Attributes:
        parameters: what else the chapter was asked for and its numbers depend on, such as `dataset`.
        findings: claim id → what was found, in the order they were judged.
        numbers: what the record keeps beside them.
    """

    def __init__(self, name: str, model: str, n_images: int, seed: int, **parameters: str | float) -> None:
        self.name, self.model, self.n_images, self.seed, self.parameters = name, model, n_images, seed, parameters
        self.findings: dict[str, Finding] = {}
        self.numbers: dict[str, float] = {}
        self.say(model_name="the shipped miniature" if model == MINIATURE else model, kind=kind_of_result(model))

    def judge(
        self,
        claim: str,
        rule: str,
        shown: Estimate | None,
        unit: str = ".2f",
        of: str = "",
        partly: str | tuple[str, ...] = (),
        needs: bool = True,
        note: str = "",
        **parts: Any,
    ) -> Card:
        """Judge one claim and show it as a card; prose may use `e40_verdict` and `e40` (number, interval) then.

        Args:
            rule: over the names of `parts`, see `embedlens.rules.decide`; printed as it stands.
            shown: the number on the card; None where there is none.
            unit: its format: ".0%", "+.1f points", ".2f".
            of: what it is a number of, "of the object tokens".
            partly: rules, each a part of the paper's sentence, that earn "partly" where the whole does not hold.
            needs: False where what the claim is about does not exist here.
            note: one sentence for the record; by default what the card says.

        Raises:
            EmbedLensError: an unknown claim, one that was judged before, or a rule that cannot be judged.
        """
        if claim not in claims() or claim in self.findings:
            what = "was judged before on this page" if claim in self.findings else "is not in claims.csv"
            raise EmbedLensError(f"claim {claim} {what}: judge each claim once, in the chapter that owns it")
        verdict = rules.conclude(rule, parts, partly, needs)
        number, of = ("", "") if shown is None else (f"{shown:{unit}}", of)
        card = Card(claim, verdict, number, of, shown, rule)
        value, low, high = (None, None, None) if shown is None else (shown.value, shown.low, shown.high)
        n = self.n_images if shown is None else shown.n
        note = note or card.sentence
        self.findings[claim] = Finding(value, low, high, n, verdict, note, rule=rule, text=card.number)
        self.say(**{f"{claim.lower()}_verdict": verdict, claim.lower(): card.number or "no number"})
        return card

    def say(self, **values: Any) -> None:
        """Hand values to the prose; an estimate as its number, and its bounds under `…_low` and `…_high`."""
        from embedlens.book import glue

        for name, value in values.items():
            if isinstance(value, Estimate):
                bounds = {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
                self.say(**bounds)
            else:
                glue(name, value)

    def record(self, **values: Any) -> None:
        """Keep numbers for the record: one under its name, a series of them under `name_0`, `name_1`, …"""
        for name, value in values.items():
            if isinstance(value, Estimate):
                self.numbers[name] = value.value
            elif np.ndim(value):
                parts = zip(getattr(value, "index", range(len(value))), np.asarray(value), strict=True)
                self.numbers |= {f"{name}_{at}": float(part) for at, part in parts}
            else:
                self.numbers[name] = float(value)

    def sign_off(self, out: Path | str | None) -> pd.DataFrame:
        """Write the record; the table of verdicts is the last thing that a reader sees."""
        write(out, self.model, self.name, self.n_images, self.seed, self.findings, self.numbers, **self.parameters)
        return verdict_table(self.findings)


@dataclass(frozen=True)
class Card:
    """One claim as a page shows it: the paper's sentence, the number here, the verdict, the rule."""

    claim: str
    verdict: str
    number: str
    of: str
    shown: Estimate | None
    rule: str

    @property
    def sentence(self) -> str:
        """Number, what it is of, and how many it rests on.

        >>> Card("E40", "holds", "2.0 points (1.0 to 3.0)", "more", Estimate(0.02, 0.01, 0.03, 9), "").sentence
        '2.0 points (1.0 to 3.0) more, n = 9 pictures'
        """
        said = " ".join(part for part in (self.number, self.of) if part)
        count = "" if self.shown is None else f", n = {self.shown.n:,} {self.shown.of}"
        return (said or "nothing to measure here") + count

    def __repr__(self) -> str:
        return f"{self.claim} · {self.sentence} · {self.verdict} · rule: {self.rule}"

    def _repr_markdown_(self) -> str:
        quoted = claims()[self.claim].statement
        return f"**{self.claim}** · “{quoted}” · {self.sentence} · **{self.verdict}**\n\n*Rule:* `{self.rule}`"


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
    """What else the chapter was asked for, such as `dataset`; a record of before they were kept has none."""

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


def judged(low: float, high: float, bar: float = 0.0) -> str:
    """The verdict on "it is more than `bar`", by where the interval lies.

    >>> judged(0.1, 0.3), judged(-0.1, 0.3), judged(-0.3, -0.1)
    ('holds', 'partly', 'does not hold')
    """
    return HOLDS if low > bar else FAILS if high <= bar else PARTLY


def counted(conditions: Iterable[bool]) -> str:
    """The verdict on a claim of several conditions: all of them hold, some do, none does.

    >>> counted([True, True]), counted([True, False]), counted([False, False])
    ('holds', 'partly', 'does not hold')
    """
    met = [bool(condition) for condition in conditions]
    return HOLDS if all(met) else PARTLY if any(met) else FAILS


def verdict_table(findings: Mapping[str, Finding]) -> pd.DataFrame:
    """Paper, here, interval, n and verdict of each claim, one row each, for the end of a chapter."""
    import pandas as pd

    rows = [
        {
            "claim": name,
            "paper": f"{claims()[name].statement}: {claims()[name].claimed}",
            "here": found.here,
            "n": found.n,
            "verdict": found.verdict,
            "note": found.note,
        }
        for name, found in sorted(findings.items())
    ]
    return pd.DataFrame(rows).set_index("claim")


def agreement(findings: Mapping[str, Finding], model: str) -> str:
    """One sentence for the top of a chapter; disagreements come first.

    >>> agreement({"E13": Finding(0.2, 0.1, 0.3, 9, "holds", "It leads.")}, "miniature")
    'On the miniature the claim tested here (E13) holds.'
    """
    on = "the miniature" if model == MINIATURE else model
    by_verdict = {
        verdict: [n for n, found in sorted(findings.items()) if found.verdict == verdict] for verdict in VERDICTS
    }
    said = []
    if by_verdict[FAILS]:
        said.append(f"{on} disagrees with the paper on {', '.join(by_verdict[FAILS])}")
    if by_verdict[PARTLY]:
        many = len(by_verdict[PARTLY]) > 1
        subject, open_ = ", ".join(by_verdict[PARTLY]), "are undecided" if many else "is undecided"
        said.append(f"{subject} {'hold' if many else 'holds'} only in part or {open_}")
    if by_verdict[HOLDS]:
        names, many = ", ".join(by_verdict[HOLDS]), len(by_verdict[HOLDS]) > 1
        subject = (
            f"the claim{'s' if many else ''} tested here ({names})"
            if len(by_verdict[HOLDS]) == len(findings)
            else names
        )
        said.append(f"{subject} {'hold' if many else 'holds'}")
    if by_verdict[UNDECIDED]:
        many = len(by_verdict[UNDECIDED]) > 1
        said.append(f"{', '.join(by_verdict[UNDECIDED])} {'are' if many else 'is'} undecided")
    if by_verdict[UNTESTABLE]:
        said.append(f"{', '.join(by_verdict[UNTESTABLE])} cannot be tested here")
    sentence = "; ".join(said) + "."
    return sentence[0].upper() + sentence[1:] if by_verdict[FAILS] else f"On {on} {sentence}"


def kind_of_result(model: str) -> str:
    """Which of the book's kinds of result a run on this model gives: "miniature" or "full scale".

    >>> kind_of_result("llava-hf/llava-1.5-7b-hf")
    'full scale'
    """
    return "miniature" if unsigned(model) == MINIATURE else "full scale"


def machine() -> str:
    """What the run ran on, without the machine's name."""
    import torch

    cores = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if not torch.cuda.is_available():
        return f"{cores}, no GPU"
    return f"{cores}, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def results(folder: Path | str | None = None) -> Path:
    """Where records lie: `folder`, else the checkout's own `results`, else `results` here.

    The checkout is looked for above the working folder, then above this package (an editable installation).
    """
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
    """Write `folder/<model>/<chapter>.json`, replacing a record of the same parameters.

    One of other parameters stays; the new one lies beside it, named by what differs, and a printed line says so.

    Args:
        folder: the book's `results`; empty: where `results` finds it.
        model: the name of what `embedlens.load` gave; a quantised model has a folder of its own.
        chapter: the notebook's name, such as "02_embedlens_vs_logitlens".
        claims: claim id → what was found.
        numbers: anything else that other pages or tests read, by name.
        parameters: what else the chapter was asked for and its numbers depend on, such as `dataset`.

    Returns:
        The file.

    Raises:
        EmbedLensError: unknown claim, a number that is not finite, or a disk that refuses.
    """
    content = {
        "model": model,
        "chapter": chapter,
        "n_images": int(n_images),
        "seed": int(seed),
        "parameters": {name: _pathless(value) for name, value in rounded(dict(sorted(parameters.items()))).items()},
        "machine": machine(),
        "versions": _versions(),
        "claims": {name: rounded(asdict(claims[name])) for name in sorted(claims)},
        "numbers": rounded(dict(sorted(numbers.items()))),
    }
    main = results(folder) / _folder_of(model) / f"{chapter}.json"
    file = _without_replacing(main, _checked(content, f"{model}/{chapter}"))
    whole = file.with_name(f"{file.name}.new")  # a disk that fills up must not leave half a record
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
    """The record in a file.

    Raises:
        EmbedLensError: no such file, no JSON, or not the fields, claims and verdicts that a record has.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EmbedLensError(f"no record at {file}: run the chapter first (embedlens book --refresh)") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise EmbedLensError(f"{file} is no JSON ({error}): run the chapter again") from None
    return _checked(content, str(file))


def overview(folder: Path | str | None = None) -> pd.DataFrame:
    """Every claim of both papers with what the records in a folder say about it.

    Args:
        folder: the book's `results`: one folder per model, one record per chapter; empty: where `results` finds it.

    Returns:
        one row for each time a chapter judged a claim on a model, and one for a claim that none has judged (verdict
        "not measured yet"): columns claim, paper, section, statement, model, chapter, here, n, verdict.

    Raises:
        EmbedLensError: a record that cannot be read.
    """
    import pandas as pd

    records = [read(file) for file in main_records(folder)]
    rows = []
    for name, claim in claims().items():
        about = {"claim": name, "paper": claim.paper, "section": claim.section, "statement": claim.statement}
        judged_in = [record for record in records if name in record.claims]
        rows += [
            {
                **about,
                "model": record.model,
                "chapter": record.chapter,
                "here": record.claims[name].here,
                "n": record.claims[name].n,
                "verdict": record.claims[name].verdict,
            }
            for record in judged_in
        ] or [{**about, "model": "–", "chapter": "–", "here": "–", "n": 0, "verdict": UNMEASURED}]
    return pd.DataFrame(rows)


def _checked(content: Any, name: str) -> Record:
    if not isinstance(content, dict) or {*content, "parameters"} != set(FIELDS):
        raise EmbedLensError(f"{name} does not have the fields {', '.join(FIELDS)}: run the chapter again")
    unknown = sorted(set(content["claims"]) - set(claims()))
    if unknown:
        raise EmbedLensError(f"{name} judges {', '.join(unknown)}, which claims.csv does not list: correct the id")
    for key, number in content["numbers"].items():
        if not isinstance(number, (int, float)) or not math.isfinite(number):
            raise EmbedLensError(f"{name}: the number {key!r} is {number!r}: record a finite number")
    try:
        found = {key: Finding(**entry) for key, entry in content["claims"].items()}
    except TypeError as error:
        raise EmbedLensError(
            f"{name}: a claim has other fields than a Finding ({error}): run the chapter again"
        ) from None
    return Record(**{**content, "claims": found})


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package).split("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are one version
        except PackageNotFoundError:
            continue
    return found


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
