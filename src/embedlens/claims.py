"""Judging the papers' claims: a chapter's verdicts as cards, its record, and all records side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embedlens import rules
from embedlens.errors import EmbedLensError
from embedlens.model_names import MINIATURE, kind_of_result
from embedlens.records import Finding, claims, main_records, read, results, write  # noqa: F401 - pages read them here
from embedlens.rules import FAILS, HOLDS, PARTLY, UNDECIDED, UNTESTABLE, VERDICTS  # noqa: F401
from embedlens.stats import Estimate

UNMEASURED = "not measured yet"


class Chapter:
    """What one run of a chapter finds: verdicts as they are judged, numbers, and at its end the record.
    chapter = Chapter("05_alive_sparsity", vlm.name, n_images, seed, dataset=dataset)
    chapter.judge("E40", "rise > 0 and doubled > 0", shown=rise, unit="+.1f points", rise=rise, doubled=doubled)
    chapter.sign_off(out)
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
        """
        if claim not in claims() or claim in self.findings:
            what = "was judged before on this page" if claim in self.findings else "is not in claims.csv"
            raise EmbedLensError(f"claim {claim} {what}: judge each claim once, in the chapter that owns it")
        verdict = rules.conclude(rule, parts, partly, needs)
        parted = " or ".join([partly] if isinstance(partly, str) and partly else partly)
        rule += f"; partly: {parted}" if parted else ""
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
                self.say(**{name: value.value, f"{name}_low": value.low, f"{name}_high": value.high})
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
        claim = claims()[self.claim]
        says = f"“{claim.headline}”" if claim.headline else claim.sentence.removesuffix(".")
        word = f"{self.verdict}, true by construction" if claim.by_construction else self.verdict
        return f"**{self.claim}** · {says} · {self.sentence} · **{word}**\n\n*Rule:* `{self.rule}`"


def verdict_table(findings: Mapping[str, Finding]) -> pd.DataFrame:
    """Paper, here, n, verdict and note of each claim, one row each, for the end of a chapter."""
    rows = {
        name: {
            "paper": f"{claims()[name].statement}: {claims()[name].claimed}",
            "here": found.here,
            "n": found.n,
            "verdict": found.verdict,
            "note": found.note,
        }
        for name, found in sorted(findings.items())
    }
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="claim"))


def overview(folder: Path | str | None = None) -> pd.DataFrame:
    """Every claim of both papers with what the records in a folder, by default the book's `results`, say about it.

    One row for each model that a claim was judged on, or one with the verdict "not measured yet": what `claims.csv`
    says of it, then model, chapter, here, n, verdict, note, rule. EmbedLensError: two records judge one claim on one
    model.
    """
    rows, owner = [], dict[tuple[str, str], str]()
    for record in map(read, main_records(folder)):
        for name, found in record.claims.items():
            other = owner.setdefault((name, record.model), record.chapter)
            if other != record.chapter:
                raise EmbedLensError(
                    f"{other}.json and {record.chapter}.json both judge {name} on {record.model}: one chapter owns a "
                    "claim, delete the record of the other"
                )
            about = {"here": found.here, "n": found.n, "verdict": found.verdict, "note": found.note}
            where = {"claim": name, "model": record.model, "chapter": record.chapter}
            rows.append(where | about | {"rule": found.rule})
    listed = pd.DataFrame([vars(claim) for claim in claims().values()]).rename(columns={"id": "claim"})
    unjudged = {"model": "–", "chapter": "–", "here": "–", "n": 0, "verdict": UNMEASURED, "note": "", "rule": ""}
    judged = pd.DataFrame(rows, columns=["claim", *unjudged])
    return listed.merge(judged, on="claim", how="left").fillna(unjudged).astype({"n": int})
