"""Which words a hidden vector is close to: EmbedLens by input embeddings, LogitLens by the unembedding.

A lens knows vectors and a vocabulary, nothing of the model's inside. Scores of many vectors are computed in slices
of rows, so that the full [rows, vocabulary] matrix is never held; the result is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from embedlens.errors import EmbedLensError
from embedlens.vlm import Unembed, VisionLanguageModel

SLICE_BYTES = 32 * 2**20  # of scores held at a time


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
        """The k best vocabulary entries: (scores, ids), best first, ties by lowest id.

        Raises:
            EmbedLensError: the vectors have another width, some are no numbers (NaN, inf), or k is not between 1 and
                the size of the vocabulary.
        """
        if h.ndim < 1 or h.shape[-1] != self.width:
            raise EmbedLensError(
                f"the vectors have shape {tuple(h.shape)}, this lens reads width {self.width}: pass hidden states of "
                "the model it was made from"
            )
        if not 1 <= k <= len(self.tokens):
            raise EmbedLensError(f"k is {k}: pass 1 to {len(self.tokens)}, the size of the vocabulary")
        rows = _readable(h.detach().reshape(-1, self.width))
        step = max(1, SLICE_BYTES // (4 * len(self.tokens)))
        best = [_topk_lowest_id(self.scores(rows[i : i + step]), k) for i in range(0, len(rows), step)]
        if not best:
            return h.new_zeros(*h.shape[:-1], k, dtype=torch.float32), h.new_zeros(*h.shape[:-1], k, dtype=torch.long)
        values, ids = (torch.cat(part).reshape(*h.shape[:-1], k) for part in zip(*best, strict=True))
        return values, ids

    def rank(self, h: Float[Tensor, "*batch d"], ids: Sequence[int]) -> Int[Tensor, "*batch"]:
        """Place of the best of `ids` among all vocabulary entries: 1 is the first, ties by lowest id.

        Holds a score per vector and entry: for a few vectors, such as one token followed through the layers.

        Raises:
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

    Norms and cosines are float32 whatever the model's dtype. Identical embedding rows get identical scores, so that
    a tie is a tie on every machine.

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
        self._unit = unit_vectors(_readable(embeddings, "embedding rows"))
        self._exclude = torch.as_tensor(list(exclude), dtype=torch.long, device=embeddings.device)
        self._repeats, self._originals = _repeated_rows(self._unit)

    @classmethod
    def from_model(cls, model: VisionLanguageModel, exclude: Sequence[int] = ()) -> EmbedLens:
        """The lens over the model's real embedding rows."""
        return cls(model.input_embeddings, model.tokens, exclude)

    def scores(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch V"]:
        """Cosine with every embedding row, in [-1, 1] up to rounding; 0 for a zero vector."""
        cosines = unit_vectors(_readable(h.detach()).to(self._unit)) @ self._unit.T
        if len(self._repeats):
            cosines[..., self._repeats] = cosines[..., self._originals]
        if len(self._exclude):
            cosines[..., self._exclude] = -torch.inf
        return cosines


class LogitLens(Lens):
    """What the model would say next if it stopped at this layer: final norm, then head.

    `h` is the residual stream *before* the final norm, as `model.hidden_states` gives it for every layer, the last
    included; there the lens gives the model's own logits. (Hugging Face's last hidden state is already normed.)
    """

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
        """Logits of every real vocabulary entry."""
        logits = self._unembed(_readable(h), norm=self.norm).float()
        if len(self._exclude):
            logits[..., self._exclude] = -torch.inf
        return logits


def unit_vectors(vectors: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """Vectors at length one, in float32 unless they are float64; zero vectors stay zero."""
    vectors = vectors.detach()
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    norms = vectors.norm(dim=-1, keepdim=True)
    return vectors / torch.where(norms > 0, norms, torch.ones_like(norms))


def _readable(vectors: Float[Tensor, "*batch d"], what: str = "vectors") -> Float[Tensor, "*batch d"]:
    """The vectors, if each has a norm: nothing is nearest to NaN or inf, and a ranking of such would be ids 0, 1, 2.

    >>> _readable(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]))
    Traceback (most recent call last):
        ...
    embedlens.errors.EmbedLensError: 1 of 2 vectors hold NaN or inf, or numbers too large for a norm: load the model
    with dtype='float32' or 'bfloat16', or leave them out
    """
    whole = vectors.detach()
    norms = torch.linalg.vector_norm(whole if whole.dtype == torch.float64 else whole.float(), dim=-1)
    known = norms.isfinite()
    if not bool(known.all()):
        raise EmbedLensError(
            f"{int((~known).sum())} of {known.numel()} {what} hold NaN or inf, or numbers too large for a norm: load "
            "the model with dtype='float32' or 'bfloat16', or leave them out"
        )
    return vectors


def _topk_lowest_id(scores: Float[Tensor, "n V"], k: int) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """torch.topk with ties by lowest id, which torch.topk does not promise.

    >>> _topk_lowest_id(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), 3)[1].tolist()
    [[1, 2, 0]]
    """
    values, ids = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    # The next best equals the last of the k: topk may have taken any of the equals. Such rows are sorted in full.
    crowded = (values[:, k:] == values[:, k - 1 : k]).any(-1).nonzero().squeeze(-1)
    values, ids = values[:, :k].clone(), ids[:, :k].clone()
    if len(crowded):
        in_full = scores[crowded].sort(dim=-1, descending=True, stable=True)
        values[crowded], ids[crowded] = in_full.values[:, :k], in_full.indices[:, :k]
    # Equal scores inside the k: order by id first, then stably by score.
    by_id = ids.argsort(dim=-1)
    values, ids = values.gather(-1, by_id), ids.gather(-1, by_id)
    by_score = values.argsort(dim=-1, descending=True, stable=True)
    return values.gather(-1, by_score), ids.gather(-1, by_score)


def _repeated_rows(rows: Float[Tensor, "V d"]) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Rows that repeat an earlier one bit for bit, and the first row each repeats.

    A matrix product may round equal columns differently, depending on where they stand; copying scores from the
    first makes ties exact. Repeats are found by a random projection of the bits and then compared in full.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(1, 2**31, (rows.shape[1],), generator=generator).to(rows.device)
    bits = (rows + 0.0).contiguous().view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    keys = torch.cat([(part.long() * weights).sum(-1) for part in bits.split(4096)])
    order = keys.argsort(stable=True)
    same = keys[order][1:] == keys[order][:-1]
    if not bool(same.any()):
        empty = torch.zeros(0, dtype=torch.long, device=rows.device)
        return empty, empty
    first = torch.cat([same.new_zeros(1), same]).logical_not()
    originals = order[first][first.cumsum(0) - 1]
    repeats = order != originals
    repeats &= (bits[order] == bits[originals]).all(-1)
    return order[repeats], originals[repeats]
