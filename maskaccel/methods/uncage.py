"""UNCAGE: unmasking with contrastive attention guidance (Kang et al. 2025, arXiv 2508.05399).

A prompt names objects with attributes ("a turtle and a pink apple"). Positions that attend to the words of one object
and not to those of another show it clearly; they are revealed first, so that later ones see objects that are apart.
The score of a position for an object is its attention to the object's own words (the least of them, so that all are
there) minus that to any other object's (the largest); the best object's score is added to the log-confidence.

Inferred: the authors had released no code when this was written, so how words and objects are reduced (least, largest,
largest) and that maps are scaled to a mean of 1 follow the text of the paper, not its implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..masks.unmasking import reveal_counts
from ..ops import attention_column_sums
from ..ops._checks import count as check_count
from . import _masked
from ._masked import Draw, Reveal
from .maskgit import anneal


def word_maps(q: Tensor, k: Tensor, lse: Tensor, words: Sequence[int], scale: float | None = None) -> Tensor:
    """Attention that each image token gets from single text tokens, without the attention map.

    Args:
        q: Queries of the text tokens, `(B, T, H, D)`.
        k: Keys of the image tokens, `(B, N, H, D)`.
        lse: fp32 `(B, H, T)` of those queries over all the keys that the model's attention has (the keys of the text
            included), as of `tile_attention(return_lse=True)`.
        words: Which text tokens.
        scale: Of the attention.

    Returns:
        fp32 `(B, len(words), N)`, mean over heads.

    Raises:
        ValueError: A word is outside of the text.
    """
    for word in words:
        if not 0 <= word < q.shape[1]:
            raise ValueError(f"words holds {word}; there are {q.shape[1]} text tokens")
    # The column sums over one query are its row of the map.
    rows = [attention_column_sums(q[:, w : w + 1], k, lse[:, :, w : w + 1], scale=scale).mean(1) for w in words]
    return torch.stack(rows, 1)


def contrastive_scores(maps: Tensor, objects: Sequence[Sequence[int]]) -> Tensor:
    """How clearly each position belongs to one object.

    Args:
        maps: `(B, W, N)`: attention of N image positions and W words.
        objects: The words of each object, its noun and its attributes, as positions in W.

    Returns:
        fp32 `(B, N)`: over objects the largest of (least of the object's own words - largest of the others'); maps are
        scaled to a mean of 1 first.

    Raises:
        ValueError: An object has no words, a word is outside of W, or `maps` has another shape.
    """
    if maps.dim() != 3:
        raise ValueError(f"maps has shape {tuple(maps.shape)}; it must be (B, W, N)")
    if not objects or not all(objects):
        raise ValueError(f"objects={objects!r} must hold the words of one object or more, one word each at least")
    for word in (w for words in objects for w in words):
        if not 0 <= word < maps.shape[1]:
            raise ValueError(f"objects holds word {word}; maps has {maps.shape[1]}")
    maps = maps.float()
    maps = maps / maps.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    found = []
    for i, words in enumerate(objects):
        others = [w for j, rest in enumerate(objects) if j != i for w in rest]
        score = maps[:, list(words)].amin(1)
        found.append(score - maps[:, others].amax(1) if others else score)
    return torch.stack(found).amax(0)


@dataclass(frozen=True)
class UNCAGE(_masked.MaskedSampling):
    """MaskGIT's steps, with contrastive attention added to the confidence that positions are ranked by.

    Attributes:
        maps: Tells the attention maps `(B, W, N)` of the model's last call, such as `word_maps`.
        objects: The words of each object, as positions in the maps.
        weight: Of the attention against the log-confidence.
        steps: Calls of the model (Meissonic: 64).
        schedule: Masked share over the steps.
        choice_temperature: Gumbel noise on the ranks at the first step; 0 at the last.
    """

    maps: Callable[[], Tensor]
    objects: tuple[tuple[int, ...], ...]
    weight: float = 1.0
    steps: int = 64
    schedule: str = "cosine"
    choice_temperature: float = 2.0

    name = "UNCAGE"
    paper = "UNCAGE: Contrastive Attention Guidance for Masked Generative Transformers (arXiv 2508.05399)"

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        reveal_counts(0, self.steps, self.schedule)

    def plan(self, free: Tensor, draw: Draw) -> Generator[Reveal, bool, None]:
        """MaskGIT's steps, ranked by scores."""
        for one in anneal(free, self.steps, self.schedule, 1.0, self.choice_temperature, 0.0):
            yield Reveal(one.count, "scores", noise=one.noise, rows=one.rows, scores=self.scores)

    def scores(self, step: int, ids: Tensor, log_confidence: Tensor) -> Tensor:
        """The log-confidence, plus `weight` times the contrastive scores."""
        return log_confidence + self.weight * contrastive_scores(self.maps(), self.objects)
