"""Which words a hidden vector is close to: EmbedLens by input embeddings, LogitLens by the unembedding.

Scores of many vectors are computed in slices of rows, so that the full [rows, vocabulary] matrix is never held.
EmbedLens searches with a product in the number format that the table has, bfloat16 too, and scores in float64 the few
entries that its rounding, bounded by what it may be at most, leaves in question: the result is the brute-force ranking.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.vlm import Unembed, VisionLanguageModel

SLICE_BYTES = 32 * 2**20  # of scores held at a time, but
SLICE_ROWS = 288  # vectors at least, so that a large table is not read once for every few of them
BLOCK = 64  # entries of which the best one stands for all in a search
FINALISTS = 256  # of a vector, scored one by one; where more are in question, all entries are scored exactly
TINY = 1e-30  # entries shorter than this, such as words that weight decay left, would overflow when they are scaled
AT_ONCE = 2**17  # numbers of finalists held at a time: few enough for a cache


class Lens(ABC):
    """A score of every vocabulary entry for any hidden vector.

    Attributes:
        width: d, the length of the vectors it reads.
        tokens: a readable word per vocabulary entry, V of them.
    """

    width: int
    tokens: Sequence[str]

    @abstractmethod
    def scores(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """Score of every vocabulary entry, float32. For many vectors `topk` needs far less memory."""

    def topk(
        self, h: Float[Tensor, "*batch d"], k: int = 5
    ) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
        """The k best vocabulary entries: (scores, ids), best first, ties by lowest id. EmbedLensError: the vectors have
        another width, some are no numbers (NaN, inf), or k is not between 1 and the size of the vocabulary."""
        if h.ndim < 1 or h.shape[-1] != self.width:
            raise EmbedLensError(
                f"the vectors have shape {tuple(h.shape)}, this lens reads width {self.width}: pass hidden states of "
                "the model it was made from"
            )
        if not 1 <= k <= len(self.tokens):
            raise EmbedLensError(f"k is {k}: pass 1 to {len(self.tokens)}, the size of the vocabulary")
        rows = _readable(h.detach().reshape(-1, self.width))
        if not len(rows):
            return h.new_zeros(*h.shape[:-1], k, dtype=torch.float32), h.new_zeros(*h.shape[:-1], k, dtype=torch.long)
        slices = -(-len(rows) // max(SLICE_ROWS, SLICE_BYTES // (4 * len(self.tokens))))
        best = [self._best(part, k) for part in rows.chunk(slices)]
        values, ids = (torch.cat(part).reshape(*h.shape[:-1], k) for part in zip(*best, strict=True))
        return values, ids

    def _best(self, rows: Float[Tensor, "n d"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        scores = self.scores(rows)
        at, ids = _contenders(scores, k)
        return _ranked(at, ids, scores[at, ids], len(rows), k)

    def rank(self, h: Float[Tensor, "*batch d"], ids: Sequence[int]) -> Int[Tensor, "*batch"]:
        """Place of the best of `ids` among all vocabulary entries: 1 is the first, ties by lowest id.

        Holds a score per vector and entry: for a few vectors, such as one token followed through the layers.
        EmbedLensError: no ids, or one that is not in the vocabulary.

        >>> EmbedLens(torch.eye(3), ["a", "b", "c"]).rank(torch.tensor([[0.0, 2.0, 1.0]]), [0, 2]).tolist()
        [2]
        """
        if not ids or not all(0 <= index < len(self.tokens) for index in ids):
            raise EmbedLensError(f"the ids are {list(ids)}: pass at least one, from 0 to {len(self.tokens) - 1}")
        scores = self.scores(h)
        wanted = torch.tensor(sorted(ids), device=scores.device)
        best = scores[..., wanted].amax(-1, keepdim=True)
        at = (scores[..., wanted] == best).int().argmax(-1, keepdim=True)  # the lowest id of equals
        everyone = torch.arange(scores.shape[-1], device=scores.device)
        ahead = (scores > best) | ((scores == best) & (everyone < wanted[at]))
        return ahead.sum(-1) + 1

    def words(self, h: Float[Tensor, "n d"], k: int = 5) -> list[list[str]]:
        """The k best words of each vector, best first."""
        if h.ndim != 2:
            raise EmbedLensError(f"words reads a list of vectors [n, d], not shape {tuple(h.shape)}: flatten it first")
        return [[self.tokens[index] for index in row] for row in self.topk(h, k)[1].tolist()]


class EmbedLens(Lens):
    """Nearest input embeddings by cosine (Eq. 1 of the paper), at any layer.

    A score is the cosine in float64, rounded to float32, whatever the model's dtype: rows of one direction tie on
    every machine. The table is read where it lies, and copied only if it has a format that cannot be searched fast.

    >>> lens = EmbedLens(torch.eye(3), ["a", "b", "c"])
    >>> lens.words(torch.tensor([[0.0, 2.0, 1.0]]), k=2)
    [['b', 'c']]
    """

    def __init__(self, embeddings: Float[Tensor, "V d"], tokens: Sequence[str], exclude: Sequence[int] = ()) -> None:
        """Args: `exclude` are ids that may never be an answer, say the special tokens (an ablation)."""
        if len(tokens) != len(embeddings):
            raise EmbedLensError(f"{len(embeddings)} embedding rows but {len(tokens)} tokens: pass one token per row")
        self.tokens = tokens
        self.width = embeddings.shape[1]
        self._rows = _searchable(_readable(embeddings.detach(), "embedding rows"))
        self._lengths = torch.cat([_lengths(part) for part in self._rows.split(4096)])
        self._scale = (1 / self._lengths).to(self._rows.dtype)
        self._tiny = (self._lengths < TINY).nonzero()[:, 0]
        self._exclude = torch.as_tensor(list(exclude), dtype=torch.long, device=embeddings.device)

    @classmethod
    def from_model(cls, model: VisionLanguageModel, exclude: Sequence[int] = ()) -> EmbedLens:
        """The lens over the model's real embedding rows."""
        return cls(model.input_embeddings, model.tokens, exclude)

    def scores(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """Cosine with every embedding row, in [-1, 1] up to rounding; 0 for a zero vector."""
        units = _units(_readable(h.detach()).to(self._rows.device))
        parts = [units @ _wide(part).T for part in self._rows.split(4096)]
        cosines = (torch.cat(parts, dim=-1) / self._lengths).float()
        cosines[..., self._exclude] = -torch.inf
        return cosines

    def _best(self, rows: Float[Tensor, "n d"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        rows = rows.to(self._rows.device)
        seen, slack = self._shown(rows)
        found = (seen @ self._rows.T).mul_(self._scale)
        if len(self._tiny):
            exact = _units(rows) @ _units(self._rows[self._tiny]).T
            found[:, self._tiny] = (exact * torch.linalg.vector_norm(_wide(seen), dim=-1, keepdim=True)).to(found.dtype)
        found[:, self._exclude] = -torch.inf
        # of the product, of the scale, of their product; and of the score, so that entries that tie in it stay
        rounding = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps) / 2
        at, ids = _contenders(found, k, slack, 2 * 4 * rounding)
        crowded = torch.bincount(at, minlength=len(rows)) > max(FINALISTS, 4 * k)
        few = ~crowded[at]
        at, ids = at[few], ids[few]
        values = self._cosines(rows, at, ids)
        if bool(crowded.any()):  # a zero vector, or one that is as near to hundreds of entries
            whole = self.scores(rows[crowded])
            where, more = _contenders(whole, k)
            at, ids = torch.cat([at, crowded.nonzero()[where, 0]]), torch.cat([ids, more])
            values = torch.cat([values, whole[where, more]])
        return _ranked(at, ids, values, len(rows), k)

    def _shown(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
        """The vectors as they are multiplied, about unit length, and how far two scores may be apart and still swapped.
        Powers of two scale exactly. Bounds: what a vector loses by the table's format; d roundings of a sum of d
        products (Higham, "Accuracy and Stability", 3.1); on a GPU, TF32 and sums of parts in bfloat16."""
        kind = self._rows.dtype
        whole = rows.to(torch.promote_types(kind, torch.float32))
        exponent = torch.frexp(_lengths(rows).float()).exponent.clamp(-100, 100)
        whole = whole * torch.exp2(-exponent.to(whole.dtype))[:, None]
        seen = whole.to(kind)
        lost = torch.linalg.vector_norm(whole - seen.to(whole.dtype), dim=-1)
        off = self.width * torch.finfo(whole.dtype).eps / 2
        if rows.device.type != "cpu" and kind != torch.float64:
            off += 2**-7 if kind == torch.bfloat16 else 2**-9
        return seen, 2.1 * (lost + off * torch.linalg.vector_norm(whole, dim=-1)).float()

    def _cosines(
        self, rows: Float[Tensor, "n d"], at: Int[Tensor, " pairs"], ids: Int[Tensor, " pairs"]
    ) -> Float[Tensor, " pairs"]:
        """Cosines of some rows with some entries, each summed by itself, so that equal entries score equal."""
        rows, step = _wide(rows), max(1, AT_ONCE // self.width)
        pairs = zip(at.split(step), ids.split(step), strict=True)
        dots = [(rows[some] * _wide(self._rows[entries])).sum(-1) for some, entries in pairs]
        cosines = (torch.cat(dots) / (_lengths(rows)[at] * self._lengths[ids])).float()
        cosines[torch.isin(ids, self._exclude)] = -torch.inf
        return cosines


class LogitLens(Lens):
    """What the model would say next if it stopped at this layer: final norm, then head. `h` is the residual stream
    *before* the final norm, as `model.hidden_states` gives it; of the last layer these are the model's own logits."""

    def __init__(self, unembed: Unembed, tokens: Sequence[str], norm: bool = True, exclude: Sequence[int] = ()) -> None:
        """Args: `norm=False` leaves the final norm out, `exclude` are ids that may never be an answer (ablations)."""
        self.tokens = tokens
        self.width = unembed.head.in_features
        self.norm = norm
        self._unembed = unembed
        self._exclude = torch.as_tensor(list(exclude), dtype=torch.long, device=unembed.head.weight.device)

    @classmethod
    def from_model(cls, model: VisionLanguageModel, norm: bool = True, exclude: Sequence[int] = ()) -> LogitLens:
        """The lens over the model's own final norm and head."""
        return cls(model.unembed, model.tokens, norm, exclude)

    @torch.no_grad()
    def scores(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """Logits of every real vocabulary entry; EmbedLensError where some are NaN, as the model overflows."""
        logits = self._unembed(_readable(h), norm=self.norm).float()
        if bool(logits.isnan().any()):
            raise EmbedLensError("some logits are NaN: load the model with dtype='float32' or 'bfloat16'")
        if len(self._exclude):
            logits[..., self._exclude] = -torch.inf
        return logits


def unit_vectors(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Vectors at length one, in float32 unless they are float64; zero vectors stay zero."""
    vectors = vectors.detach()
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, torch.ones_like(norms))


def _wide(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """In float64, which Apple's GPUs do not have."""
    return vectors.float() if vectors.device.type == "mps" else vectors.double()


def _lengths(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Norms, 1 for a zero vector, whose cosines are all 0."""
    lengths = torch.linalg.vector_norm(_wide(vectors), dim=-1)
    return torch.where(lengths > 0, lengths, torch.ones_like(lengths))


def _units(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    wide = _wide(vectors)
    return wide / _lengths(wide)[..., None]


def _searchable(rows: Float[Tensor, "V d"]) -> Float[Tensor, "V d"]:
    """The table in a format in which products are fast and do not overflow: as it is, or in float32."""
    fast = rows.device.type != "cpu"  # processors without such instructions take many times as long as in float32
    fast = fast or any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    as_it_is = rows.dtype in (torch.float32, torch.float64) or (rows.dtype == torch.bfloat16 and fast)
    return rows if as_it_is else rows.float()


def _readable(vectors: Float[Tensor, "*batch d"], what: str = "vectors") -> Float[Tensor, "*batch d"]:
    """The vectors, if each has a norm: nothing is nearest to NaN or inf, and a ranking of such would be ids 0, 1, 2.

    >>> _readable(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]))
    Traceback (most recent call last):
        ...
    embedlens.errors.EmbedLensError: 1 of 2 vectors hold NaN or inf, or numbers too large for a norm: load the model
    with dtype='float32' or 'bfloat16', or leave them out
    """
    parts = vectors.detach().reshape(-1, vectors.shape[-1]).split(4096)  # no copy of a whole table
    norms = torch.cat([torch.linalg.vector_norm(part.float(), dim=-1) for part in parts])
    known = norms.isfinite()
    if not bool(known.all()):
        raise EmbedLensError(
            f"{int((~known).sum())} of {known.numel()} {what} hold NaN or inf, or numbers too large for a norm: load "
            "the model with dtype='float32' or 'bfloat16', or leave them out"
        )
    return vectors


def _contenders(
    scores: Float[Tensor, "n V"], k: int, slack: Float[Tensor, " n"] | float = 0.0, relative: float = 0.0
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Every entry that may be among a row's k best: (rows, ids), rows in order. Entries stand in blocks with a stride,
    and a block is looked into if its best is good enough: a score is read once, and few are sorted. The k-th best block
    is no better than the k-th best entry, so none is missed.

    Args:
        slack: a row's scores this far below its k-th best still count, and
        relative: so much of the k-th best's own size.

    >>> _contenders(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), 1)[1].tolist()
    [1, 2]
    """
    entries = scores.shape[1]
    members = max(1, min(BLOCK, entries // (16 * k), isqrt(entries)))
    blocks = entries // members
    best = scores[:, : members * blocks].unflatten(1, (members, blocks)).amax(1)
    rest = scores[:, members * blocks :]
    best[:, : rest.shape[1]] = torch.maximum(best[:, : rest.shape[1]], rest)
    least = best.topk(k, dim=-1).values[:, -1].to(torch.promote_types(scores.dtype, torch.float32))
    least = least - slack - relative * least.abs()
    at, block = (best >= least[:, None]).nonzero(as_tuple=True)
    ids = block[:, None] + blocks * torch.arange(members + 1, device=block.device)
    good = scores[at[:, None], ids.clamp(max=entries - 1)] >= least[at, None]
    pair, place = (good & (ids < entries)).nonzero(as_tuple=True)
    return at[pair], ids[pair, place]


def _ranked(
    at: Int[Tensor, " pairs"], ids: Int[Tensor, " pairs"], values: Float[Tensor, " pairs"], rows: int, k: int
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k best of each row, of which each has so many at least: (values, ids), ties by lowest id."""
    order = ids.argsort()
    for key in (-values, at):
        order = order[key[order].argsort(stable=True)]
    counts = torch.bincount(at, minlength=rows)
    first = (counts.cumsum(0) - counts)[:, None]
    chosen = order[first + torch.arange(k, device=order.device)]
    return values[chosen], ids[chosen]
