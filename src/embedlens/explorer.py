"""One page to look inside a picture: every visual token's words by lens and layer, its group, and who attends to it.

The page, framed by `explorer.html`, makes no request: it decodes packed arrays, and every text is set as text.
"""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from embedlens.attention_maps import NEUTRAL, attention, question_ids, relative, rollout
from embedlens.batches import in_batches
from embedlens.errors import EmbedLensError, writing
from embedlens.figures import patch_words
from embedlens.groups import Reference, reference_of, token_groups
from embedlens.lenses import EmbedLens, Lens, LogitLens
from embedlens.model_names import MINIATURE
from embedlens.patches import PatchGrid
from embedlens.pictures import Picture
from embedlens.vlm import QUESTION, Prompt, VisionLanguageModel

ABOUT = {
    "EmbedLens": "nearest input embeddings",
    "LogitLens": "what the output head would say",
    "ContextLens": "nearest words inside the model",
    "Alone": "the answer from this token only",
}
WHY = {
    "alive": "neither sink nor dead",
    "dead": "near one word that is the same in every picture",
    "ViT sink": "of abnormal norm in the vision tower",
    "LLM sink": "large in the massive dimensions of the language model",
}
NOTE = (
    "the miniature knows only the drawn world that it was trained on; for a photograph name a real model, such as "
    "HuggingFaceTB/SmolVLM-256M-Instruct, which a laptop runs (0.5 GB)"
)
MOST_SIMILAR = 1500  # tokens of which all pairs are compared
HEADS_BYTES = 600_000  # of attention by head; beyond it later tokens have the mean over heads only
ASKING_BYTES = 400_000  # of attention of the question's tokens; beyond it the first ones are left out
SIDE = 560  # px of a view's picture
AT_ONCE = 64  # prompts of one visual token that run together
HEIGHT = 1180  # px of the page in a notebook


@dataclass(frozen=True, eq=False)
class Explorer:
    """The page of one or several pictures: shows itself in a notebook, `save` writes it as one file."""

    scenes: Sequence[Mapping[str, Any]] = field(repr=False)
    words: Sequence[str] = field(repr=False)
    model: str
    twin: Image.Image = field(repr=False)  #: The first picture's readings side by side, for print
    start: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def html(self) -> str:
        """The page, as a text without any reference to the outside."""
        packed = bytearray()
        listed = np.frombuffer(json.dumps(list(self.words)).encode("ascii"), dtype=np.uint8)
        whole = {"scenes": self.scenes, "words": listed, "model": self.model, "start": self.start}
        index = json.dumps(_packed(whole, packed)).replace("<", "\\u003c")
        blob = base64.b64encode(gzip.compress(bytes(packed), mtime=0)).decode("ascii")
        frame = files("embedlens").joinpath("explorer.html").read_text(encoding="utf-8")
        title = html.escape(f"{self.scenes[0]['name']} · {self.model}")
        filled = re.sub(
            "__(TITLE|INDEX|BLOB)__", lambda at: {"TITLE": title, "INDEX": index, "BLOB": blob}[at[1]], frame
        )
        return filled.encode("utf-8", "replace").decode("utf-8")  # a file's name may be no text

    @property
    def alt(self) -> str:
        """What the static twin shows, in words."""
        one = self.scenes[0]
        read = ", ".join(lens["name"] for lens in one["lenses"])
        return (
            f"{len(one['group'])} visual tokens of {one['name']} in {self.model}: {read} side by side; "
            f"asked {one['question']!r}, the model answers {one['answer']!r}"
        )

    def save(self, file: Path | str) -> Path:
        """Write the page to one .html file, or its static twin to a picture file. EmbedLensError: another ending, or a
        place that cannot be written."""
        file = Path(file).expanduser()
        if file.suffix.lower() not in (".html", ".htm", ".png"):
            raise EmbedLensError(f"{file.name or file} has no ending .html or .png: name such a file")
        with writing(file):
            if file.suffix.lower() == ".png":
                self.twin.save(file)
            else:
                file.write_text(self.html, encoding="utf-8")
        return file

    def _repr_html_(self) -> str:
        inner, title = html.escape(self.html), html.escape(self.alt.encode("utf-8", "replace").decode("utf-8"))
        return f'<iframe srcdoc="{inner}" title="{title}" width="100%" height="{HEIGHT}" style="border:0"></iframe>'


def explore(
    model: VisionLanguageModel,
    image: Picture | Sequence[Picture],
    question: str = QUESTION,
    *,
    k: int | None = None,
    lenses: Mapping[str, Lens] | None = None,
    reference: Reference | None = None,
    names: Sequence[str] | None = None,
    patch: int | None = None,
    layer: int = 0,
    max_new_tokens: int = 16,
) -> Explorer:
    """Look at every visual token of a picture: words by lens and layer, group, norm, and what the answer attends to.

    Args:
        image: a picture, or several to choose from.
        question: what is asked; attention is that of the answer to it.
        k: words per token; by default 5, of large pictures 3.
        lenses: more readings, by name, such as an `embedlens.ContextLens`.
        reference: what tells the groups apart, from `embedlens.discover`; by default `reference_of(model)`.
        names: of the pictures; by default their file names.
        patch: which token is pinned at first.
        layer: which layer is shown at first.

    Returns:
        the page; `.save("x.html")` writes it, `.save("x.png")` its static twin.

    Raises:
        EmbedLensError: unreadable picture, empty question, no such layer or patch.
    """
    images: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise EmbedLensError("no picture to explore: pass at least one")
    if model.intervention is not None:
        raise EmbedLensError("a page is of the model as it is: leave the intervene block first")
    if layer not in range(model.n_layers + 1):
        raise EmbedLensError(f"no layer {layer} in {model.name}: pass 0 to {model.n_layers}")
    more = dict(lenses) if isinstance(lenses, Mapping) else lenses or {}
    if not isinstance(more, dict) or "Alone" in more or not all(isinstance(lens, Lens) for lens in more.values()):
        raise EmbedLensError("lenses are lenses by name, none of them 'Alone': pass such as {'ContextLens': bank}")
    if names is not None and (isinstance(names, str) or len(names) != len(images)):
        raise EmbedLensError(f"{len(names)} names for {len(images)} pictures: pass a list with one name per picture")
    readers: dict[str, Lens] = {"EmbedLens": EmbedLens.from_model(model), "LogitLens": LogitLens.from_model(model)}
    readers |= more
    reference = reference_of(model) if reference is None else reference
    words = _Dictionary()
    scenes: list[dict[str, Any]] = []
    for place, one in enumerate(images):
        called = Path(one).name if isinstance(one, (str, os.PathLike)) else f"picture {place + 1}"
        name = str(names[place]) if names else called
        prompt = model.prompt(one, question)
        if patch is not None and patch not in range(len(prompt.grid)):
            raise EmbedLensError(f"no patch {patch} in {name}: it has 0 to {len(prompt.grid) - 1}")
        scene, top = _scene(model, prompt, readers, reference, k, max_new_tokens, words)
        if not scenes:
            twin = _side_by_side(prompt, top)
        scenes.append({"name": name, **scene})
    start = {"layer": int(layer)} | ({} if patch is None else {"patch": int(patch)})
    return Explorer(scenes, list(words.numbers), model.name, twin, start)


class _Dictionary:
    """Words by number, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, tokens: Sequence[str], ids: Int[Tensor, "*batch k"]) -> np.ndarray:
        used, places = np.unique(ids.cpu().numpy(), return_inverse=True)
        numbers = [self.numbers.setdefault(tokens[index], len(self.numbers)) for index in used.tolist()]
        return np.array(numbers, dtype=np.uint32)[places].reshape(ids.shape)


@torch.no_grad()
def _scene(
    model: VisionLanguageModel,
    prompt: Prompt,
    readers: Mapping[str, Lens],
    reference: Reference,
    k: int | None,
    max_new_tokens: int,
    words: _Dictionary,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What the page knows of one picture, and the first word of each token in each reading, for the twin."""
    n = len(prompt.grid)
    k = (5 if n <= 256 else 3) if k is None else k
    stream = model.hidden_states(prompt)[:, prompt.visual]
    parts, top = [], {}
    for name, lens in readers.items():
        scores, ids = lens.topk(stream, k)
        if not bool(scores.isfinite().all()):  # words that the lens excludes
            raise EmbedLensError(f"{name} has fewer than {k} words for a token: pass a smaller k")
        unit = "cosine" if isinstance(lens, EmbedLens) else "logit" if isinstance(lens, LogitLens) else "score"
        parts.append(_reading(name, unit, words.of(lens.tokens, ids), scores))
        top[name] = [lens.tokens[index] for index in ids[0, :, 0].tolist()]
    sure, ids = alone(model, prompt, k)
    parts.append(_reading("Alone", "probability", words.of(model.tokens, ids[None]), sure[None]))
    top["Alone"] = [model.tokens[index] for index in ids[:, 0].tolist()]
    answer = model.answer_ids(prompt, max_new_tokens)
    said = answer[:-1].tolist() or None
    behind = question_ids(model, prompt)
    asking = min(len(behind) - 1, ASKING_BYTES // (model.n_layers * n))  # its last one looks for the answer's first
    behind, looks = behind[-1 - asking : -1], attention(model, prompt, said, question=True)
    looks = looks[:, :, -max(1, len(answer)) - asking :].roll(-asking, dims=2)  # the answer's before the question's
    usual = attention(model, model.asked(prompt, NEUTRAL))
    heads = min(looks.shape[2], max(1, HEADS_BYTES // looks[:, :, 0].numel()))
    answered = looks.shape[2] - asking
    groups = token_groups(model, prompt, reference)
    unit = normalize(stream[0].float(), dim=-1)
    found = {
        "question": prompt.question,
        "answer": model.tokenizer.decode(answer, skip_special_tokens=True).strip(),
        "said": [model.tokenizer.decode([index]) for index in answer.tolist()],
        "asking": [model.tokenizer.decode([index]) for index in behind.tolist()],
        "note": NOTE if model.name == MINIATURE and photographed(prompt.image) else "",
        "layers": model.n_layers,
        "views": _views(prompt),
        "bars": prompt.grid.padded.numpy().astype(np.uint8),
        "lenses": parts,
        "group": groups.names,
        "why": WHY,
        "norm": _steps(stream.float().norm(dim=-1)),
        "similar": _steps(unit @ unit.T, np.uint8) if n <= MOST_SIMILAR else None,
        "looks": _steps(looks[:, :, :answered].mean(1)),
        "asks": _steps(looks[:, :, answered:].mean(1).sqrt(), np.uint8) | {"power": 2},
        "heads": _steps(looks[:, :, :heads].sqrt(), np.uint8) | {"power": 2},
        "relative": _steps(relative(looks[:, :, 0].mean(1), usual[:, :, 0].mean(1))),
        "rollout": _steps(rollout(model, prompt)[:, 0]) if n <= MOST_SIMILAR else None,
    }
    return found, top


@torch.no_grad()
def alone(model: VisionLanguageModel, prompt: Prompt, k: int = 5) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k likeliest first words of the answer for each visual token as the only one: (probabilities, ids)."""
    n = len(prompt.grid)
    singles = [prompt.without(torch.arange(n, device=prompt.ids.device) != place) for place in range(n)]

    def run(start: int, batch: Sequence[Prompt]) -> list[tuple[Tensor, Tensor]]:
        with model.running(batch, start, n) as entered:
            embeds, padding = model.padded(entered)
            logits = model.hf(inputs_embeds=embeds, attention_mask=padding, use_cache=False).logits[:, -1]
        return list(zip(*logits[:, : len(model.tokens)].float().softmax(-1).topk(k), strict=True))

    values, indices = zip(*in_batches(run, singles, AT_ONCE), strict=True)
    return torch.stack(values).cpu(), torch.stack(indices).cpu()


def _reading(name: str, unit: str, ids: np.ndarray, scores: Float[Tensor, "layers n k"]) -> dict[str, Any]:
    return {"name": str(name), "about": ABOUT.get(name, ""), "unit": unit, "ids": ids, "scores": _steps(scores)}


def _steps(values: Float[Tensor, "*shape"], kind: type = np.uint16) -> dict[str, Any]:
    """Numbers in as many steps between the smallest and the largest as the kind has."""
    values = values.detach().float().cpu().numpy()
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    step = (high - low) / np.iinfo(kind).max or 1.0
    return {"low": low, "step": step, "of": np.round((values - low) / step).astype(kind)}


def photographed(image: Image.Image) -> bool:
    """Whether a picture has the many colours of a photograph, not the few of a drawing."""
    return len(set(image.resize((64, 64)).getdata())) >= 1500


def _views(prompt: Prompt) -> list[dict[str, Any]]:
    """Each view's first token, shape and picture as the model sees it, as a data address."""
    views, start = [], 0
    for grid in prompt.grid.views:
        seen = _seen(prompt.image, grid)
        kept = io.BytesIO()
        kind = "jpeg" if photographed(seen) else "png"
        seen.save(kept, kind, quality=85, optimize=True)
        address = f"data:image/{kind};base64,{base64.b64encode(kept.getvalue()).decode('ascii')}"
        views.append({"start": start, "rows": grid.rows, "cols": grid.cols, "picture": address})
        start += len(grid)
    return views


def _seen(image: Image.Image, grid: PatchGrid) -> Image.Image:
    """The part of the plane that the view's cells cover, bars grey."""
    (x0, y0, *_), (*_, x1, y1) = grid.cell(0), grid.cell(len(grid) - 1)
    scale = min(1.0, SIDE / max(x1 - x0, y1 - y0))
    size = max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale))
    plane = Image.new("RGB", size, (128, 128, 128))
    shown = (max(x0, 0), max(y0, 0), min(x1, image.width), min(y1, image.height))
    if shown[2] > shown[0] and shown[3] > shown[1]:
        part = image.resize(
            (max(1, round((shown[2] - shown[0]) * scale)), max(1, round((shown[3] - shown[1]) * scale))), box=shown
        )
        plane.paste(part, (round((shown[0] - x0) * scale), round((shown[1] - y0) * scale)))
    return plane


def _side_by_side(prompt: Prompt, top: Mapping[str, Sequence[str]]) -> Image.Image:
    start, view = prompt.grid.overview
    drawn = [patch_words(prompt.image, view, words[start : start + len(view)]) for words in top.values()]
    gap = max(8, drawn[0].width // 40)
    sheet = Image.new("RGB", (sum(one.width + gap for one in drawn) - gap, drawn[0].height), "white")
    for place, one in enumerate(drawn):
        sheet.paste(one, (place * (one.width + gap), 0))
    return sheet


def _packed(value: Any, into: bytearray) -> Any:
    """The same nesting with every array replaced by where it lies; all texts, too, are in the packed part."""
    if isinstance(value, np.ndarray):
        into.extend(b"\0" * (-len(into) % 4))
        place = len(into)
        if value.dtype == np.uint32 and value.size and int(value.max()) < 2**16:
            value = value.astype(np.uint16)
        into.extend(np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<")).tobytes())
        return {"at": place, "type": value.dtype.name, "shape": list(value.shape)}
    if isinstance(value, Mapping):
        return {key: _packed(part, into) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(part, into) for part in value]
    return value
