"""Cross-attention layers of papers: regions, identities, and masks that a network predicts."""

from __future__ import annotations

import pytest
import torch
from _attention_layers import DTYPES, check, heads_of, project, softmax_attention
from torch.nn import functional as F

from maskaccel import methods as m


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ regions
BOXES = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.3, 0.3, 0.9, 1.0]], [[0.5, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])


def inside(boxes, grid):
    """Token by token: bool `(B, S, R)`."""
    frames, height, width = grid
    result = []
    for b in range(len(boxes)):
        for f in range(frames):
            for y in range(height):
                for x in range(width):
                    row = []
                    for r in range(boxes.shape[-2]):
                        top, left, bottom, right = (boxes[b, r] if boxes.dim() == 3 else boxes[b, f, r]).tolist()
                        cy, cx = (y + 0.5) / height, (x + 0.5) / width
                        row.append(top <= cy < bottom and left <= cx < right)
                    result.append(row)
    return torch.tensor(result).view(len(boxes), -1, boxes.shape[-2])


@pytest.mark.parametrize("moving", [False, True])
def test_box_regions(moving):
    grid = (3, 7, 9)
    boxes = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(2)) if moving else BOXES
    assert torch.equal(m.box_regions(boxes, grid), inside(boxes, grid))


def test_region_mask_of_overlapping_boxes():
    grid, counts = (2, 7, 9), (5, 40)
    regions = inside(BOXES, grid)
    assert (regions.sum(-1) == 2).any() and (regions.sum(-1) == 0).any()
    mask = m.region_mask(regions, counts)
    expected = torch.cat([regions[:, :, r : r + 1].expand(-1, -1, n) for r, n in enumerate(counts)], dim=2)
    assert torch.equal(mask.to_bool(), expected[:, None])


def test_identity_mask_and_skipped_tiles():
    frames, height, width, count, per = 4, 8, 16, 3, 4
    identities = torch.full((2, frames, height, width), -1)
    identities[0, :, 2:5, 3:6] = 0
    identities[0, :, 4:7, 9:13] = 2
    identities[1, 1:3, :, :4] = 1
    mask = m.identity_mask(identities, count, per)
    flat = identities.flatten(1)
    frame_of_query = torch.arange(frames).repeat_interleave(height * width)
    frame_of_key = torch.arange(frames).repeat_interleave(count * per)
    of_key = torch.arange(count).repeat_interleave(per).repeat(frames)
    expected = (flat[:, :, None] == of_key) & (frame_of_query[:, None] == frame_of_key)
    assert torch.equal(mask.to_bool(), expected[:, None])
    rows = mask.tiles().any(-1)[:, 0]  # a frame is one tile of queries
    assert rows.tolist() == [[True] * 4, [False, True, True, False]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_cross_attention(dtype):
    grid, counts, heads = (2, 7, 9), (5, 38), 2
    regions = inside(BOXES, grid)
    mask = m.region_mask(regions, counts)
    keep = torch.cat([regions[:, :, r : r + 1].expand(-1, -1, n) for r, n in enumerate(counts)], dim=2)[:, None]
    outside = ~regions.any(-1)
    layer = m.MaskedCrossAttention(20, heads, 24)
    assert not layer.v.weight.any()

    def formula(p, q, context):
        k, v = (heads_of(project(p, name, context), heads) for name in ("k", "v"))
        out = softmax_attention(q.transpose(1, 2), k, v, 24**-0.5, keep=keep)
        return out.unflatten(-1, (heads, -1))

    q, context = randn(2, 126, heads, 24), randn(2, 43, 20, seed=3)
    check(layer, formula, [q, context], dtype, lambda q, context: layer(q, context, mask))
    out = layer(q.to(dtype).requires_grad_(), context.to(dtype), mask)
    assert not out[outside].any() and out[~outside].any()


def test_rows_outside_all_regions_have_no_gradient():
    regions = inside(BOXES, (2, 7, 9))
    layer = m.MaskedCrossAttention(20, 2, 24)
    torch.nn.init.normal_(layer.v.weight)
    q = randn(2, 126, 2, 24).requires_grad_()
    layer(q, randn(2, 43, 20), m.region_mask(regions, (5, 38))).square().sum().backward()
    outside = ~regions.any(-1)
    assert not q.grad[outside].any() and q.grad[~outside].any() and q.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: m.box_regions(BOXES[0], (1, 2, 2)), "boxes has shape"),
        (lambda: m.box_regions(BOXES[:, None], (2, 2, 2)), "boxes has shape"),
        (lambda: m.region_mask(torch.ones(2, 8, 2, dtype=torch.bool), (3,)), "for 1 regions"),
        (lambda: m.region_mask(torch.ones(2, 8, 2), (3, 4)), "bool"),
        (lambda: m.identity_mask(torch.ones(2, 8, 2, 2), 2, 4), "int32 or int64"),
        (lambda: m.identity_mask(torch.full((1, 2, 2, 2), 3), 3, 4), "there are 3 identities"),
        (lambda: m.predicted_mask(torch.ones(2, 8, 2), (4, 4)), "logits has shape"),
        (lambda: m.Mask2FormerAttention(48, 5), "heads=5"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# ------------------------------------------------------------------------------------------------ Mask2Former
def predicted(seed=4):
    """Logits `(2, 37, 5, 7)`: blobs; query 3 sees nothing, query 5 everything."""
    logits = randn(2, 37, 5, 7, seed=seed) - 0.5
    logits[:, 3], logits[:, 5] = -4.0, 4.0
    return logits


def test_predicted_mask_resets_empty_rows():
    size = (11, 13)
    mask = m.predicted_mask(predicted(), size)
    resized = F.interpolate(predicted(), size=size, mode="bilinear", align_corners=False)
    blocked = (resized.sigmoid() < 0.5).flatten(2)
    blocked[blocked.all(-1)] = False
    assert torch.equal(mask.to_bool(), ~blocked[:, None])
    assert mask.to_bool()[:, 0, 3].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [False, True])
def test_mask2former(positions, dtype):
    size, heads, dim = (11, 13), 2, 48
    logits = predicted()
    mask = m.predicted_mask(logits, size)
    layer = m.Mask2FormerAttention(dim, heads)

    def formula(p, queries, features, *at):
        blocked = (F.interpolate(logits, size=size, mode="bilinear", align_corners=False).sigmoid() < 0.5).flatten(2)
        blocked[blocked.all(-1)] = False
        q_at, k_at = at if at else (0.0, 0.0)
        q, k, v = (
            heads_of(project(p, name, t), heads)
            for name, t in (("q", queries + q_at), ("k", features + k_at), ("v", features))
        )
        out = project(p, "out", softmax_attention(q, k, v, 24**-0.5, keep=~blocked[:, None]))
        return F.layer_norm(queries + out, (dim,), p["norm.weight"], p["norm.bias"])

    inputs = [randn(2, 37, dim), randn(2, 143, dim, seed=2)]
    if positions:
        inputs += [randn(2, 37, dim, seed=5), randn(2, 143, dim, seed=6)]
    call = lambda queries, features, *at: layer(queries, features, mask, *at)  # noqa: E731
    check(layer, formula, inputs, dtype, call)


def test_a_mask_made_in_inference_mode_can_be_trained_with():
    layer = m.Mask2FormerAttention(48, 2)
    with torch.inference_mode():
        mask = m.predicted_mask(predicted(), (11, 13))
        sampled = layer(randn(2, 37, 48), randn(2, 143, 48), mask)
    out = layer(randn(2, 37, 48), randn(2, 143, 48), mask)
    torch.testing.assert_close(out, sampled)
    out.sum().backward()


def test_masks_of_every_layer_read_nothing_from_the_device():
    """On meta tensors every `item()` and copy to the host raises."""
    layer = m.Mask2FormerAttention(48, 2).to("meta")
    queries, features = (torch.empty(2, n, 48, device="meta", requires_grad=True) for n in (37, 143))
    for _ in range(2):
        mask = m.predicted_mask(torch.empty(2, 37, 5, 7, device="meta"), (11, 13))
        queries = layer(queries, features, mask)
    queries.sum().backward()
    assert features.grad.is_meta and features.grad.shape == features.shape
