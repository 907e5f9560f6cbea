"""Samplers that look at attention maps: UNCAGE's order, EditMGT's region."""

from __future__ import annotations

import math

import torch
from _masked_models import Toy

from maskaccel import methods
from maskaccel.masks import unmasking
from maskaccel.methods.editmgt import localize
from maskaccel.methods.uncage import contrastive_scores, word_maps

V, N = 11, 24


def masked() -> torch.Tensor:
    return torch.full((2, N), V)


def test_word_maps_are_rows_of_the_attention_map():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 3, 16, generator=generator), torch.randn(2, 14, 3, 16, generator=generator)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    image = k[:, 5:].contiguous()  # the first keys are the text's
    got = word_maps(q, image, scores.logsumexp(-1), [1, 3])
    assert torch.allclose(got, scores.softmax(-1)[:, :, [1, 3], 5:].mean(1), atol=1e-5)


def test_uncage_reveals_what_belongs_to_one_object():
    maps = torch.rand(2, 4, N, generator=torch.Generator().manual_seed(3))
    objects = ((0,), (1, 2))
    scaled = maps / maps.mean(-1, keepdim=True)
    want = torch.maximum(
        scaled[:, 0] - torch.maximum(scaled[:, 1], scaled[:, 2]),
        torch.minimum(scaled[:, 1], scaled[:, 2]) - scaled[:, 0],
    )
    assert torch.allclose(contrastive_scores(maps, objects), want)
    method = methods.UNCAGE(lambda: maps, objects, weight=1e4, steps=4, choice_temperature=0.0)
    seen = []
    got = method.sample(Toy(), masked(), V, on_step=lambda _, tokens: seen.append(tokens))
    best = want.argsort(1, descending=True)[:, : unmasking.reveal_counts(N, 4)[0]]
    assert (seen[0] != V).equal(torch.zeros(2, N, dtype=torch.bool).scatter(1, best, True)) and (got != V).all()


def test_editmgt_keeps_what_lies_outside():
    maps = torch.zeros(2, 2, N)
    maps[:, :, 8:11] = 1.0  # row 1 of a 4 x 6 grid
    scores = localize(maps, (4, 6), sigma=0.7)
    assert scores.amin(1).tolist() == [0.0, 0.0] and scores.amax(1).tolist() == [1.0, 1.0]
    assert localize(maps, (4, 6), sigma=0).equal(maps[0])
    reference = torch.randint(0, V, (2, N), generator=torch.Generator().manual_seed(1))
    method = methods.EditMGT(threshold=0.5, steps=3)
    inside = scores >= 0.5
    assert 3 <= int(inside[0].sum()) < N
    assert method.start(reference, scores, V).equal(torch.where(inside, V, reference))
    got = method.edit(Toy(), reference, scores, V)
    assert got[~inside].equal(reference[~inside]) and (got != V).all()


def test_smoothing_is_a_gaussian():
    maps = torch.rand(1, 48, generator=torch.Generator().manual_seed(5))
    image = (maps - maps.min()) / (maps.max() - maps.min())
    reach = 3
    kernel = torch.tensor([[math.exp(-0.5 * (y * y + x * x)) for x in range(-3, 4)] for y in range(-3, 4)])
    padded = torch.nn.functional.pad(image.view(1, 1, 6, 8), (reach,) * 4, mode="replicate")
    want = torch.nn.functional.conv2d(padded, (kernel / kernel.sum())[None, None]).flatten(1)
    want = (want - want.min()) / (want.max() - want.min())
    assert torch.allclose(localize(maps, (6, 8), sigma=1.0), want, atol=1e-5)
