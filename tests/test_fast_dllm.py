"""Cached keys and values of masked language models: what is exact, and the approximations against plain torch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _numerics import assert_close_to_truth
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from zoo.masked import Output, TinyLLaDA

import maskaccel
from maskaccel import methods
from maskaccel.masks.unmasking import block_ids
from maskaccel.patching.transaction import PatchError
from maskaccel.state.kv import KVStorage

MASK, WIDTH, HEADS, PROMPT, LENGTH, BLOCK = 39, 32, 2, 8, 16, 8
N = PROMPT + LENGTH


class Layer(nn.Module):
    """Attention with rotary places, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def heads(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `(B, H, S, D)`."""
        q, k, v = (
            t.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for t in self.qkv(F.layer_norm(hidden, (WIDTH,))).chunk(3, dim=-1)
        )
        angles = places[:, None, :, None] / 10.0 ** torch.arange(4).to(hidden.dtype)

        def turned(t: Tensor) -> Tensor:
            a, b, rest = t[..., :4], t[..., 4:8], t[..., 8:]
            cos, sin = angles.cos(), angles.sin()
            return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)

        return turned(q), turned(k), v

    def after(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer."""
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(F.layer_norm(hidden, (WIDTH,)))

    def forward(self, hidden: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden rows."""
        q, k, v = self.heads(hidden, places)
        return self.after(hidden, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class Tiny(nn.Module):
    """A masked language model of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(MASK + 1, WIDTH), nn.Linear(WIDTH, MASK)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.rows: list[int] = []

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Output:
        """Logits `(B, N, V)`; the mask is `(B, N)` of keys or `(B, 1, N, N)`, True where seen."""
        self.rows.append(input_ids.shape[1])
        places = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None, :]
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, places.to(hidden.dtype), attention_mask)
        return Output(6 * self.head(hidden))


@functools.cache
def _tiny() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Tiny().eval()


def tiny() -> Tiny:
    return copy.deepcopy(_tiny())


def llama(causal: bool = False) -> LlamaForCausalLM:
    """Two layers with grouped queries, bidirectional unless told otherwise."""
    config = LlamaConfig(
        vocab_size=MASK + 1, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=64,
    )  # fmt: skip
    config.is_causal = causal
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.is_causal = causal
    return model


MODELS: dict[str, Any] = {"tiny": tiny, "llama": llama}


def prompt(batch: int = 2) -> Tensor:
    return torch.randint(0, MASK, (batch, PROMPT), generator=torch.Generator().manual_seed(5))


class Recorder:
    """A head that keeps the logits it is given, those of masked tokens."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, logits: Tensor) -> Tensor:
        self.seen.append(logits.clone())
        return logits


def answer(model: Any, sampler: Any, cache: Any = None, **options: Any) -> Tensor:
    return sampler.generate(model, prompt(), LENGTH, MASK, cache=cache, **options)


def later_hidden(block: int = BLOCK) -> Tensor:
    """LLaDA2's mask `(1, 1, N, N)`: True where seen."""
    ids = torch.arange(N) // block
    return (ids[:, None] >= ids)[None, None]


# ------------------------------------------------------------------------------------------------------------ exact
SAMPLERS = {
    "blocks": methods.LLaDA(steps=8, block=BLOCK),
    "one block": methods.LLaDA(steps=5),
    "uneven": methods.LLaDA(steps=9, block=5),
    "threshold": methods.LLaDA(block=BLOCK, threshold=0.3),
    "guidance": methods.LLaDA(steps=4, block=BLOCK, guidance=0.7),
}


@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_whole_calls_at_every_step_give_the_same_tokens(make, sampler, cache):
    model = make()
    want = answer(model, sampler)
    with maskaccel.patch(model, [methods.FastDLLM(cache, refresh=1)]) as patch:
        assert answer(model, sampler, model).equal(want)
        told = patch.report().activity["FastDLLM"]
    assert told["computed"] > 0 and told["in part"] == 0
    assert not want.eq(MASK).any() and len(want.unique()) > 4


@pytest.mark.parametrize("sampler", [SAMPLERS["blocks"], SAMPLERS["threshold"], methods.LLaDA(steps=4)])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("additive", [False, True])
def test_hidden_later_blocks_make_it_exact(make, sampler, additive):
    model, mask = make(), later_hidden()
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

    def call(tokens: Tensor) -> Any:
        return model(tokens, attention_mask=mask)

    plain, cached = Recorder(), Recorder()
    want = answer(call, sampler, head=plain)
    with maskaccel.patch(model, [methods.FastDLLM("causal", block=BLOCK)]) as patch:
        got = answer(call, sampler, model, head=cached)
        told = patch.report().activity["FastDLLM"]
    assert told["computed"] == 1 and told["in part"] == len(plain.seen) - 1 > 0
    assert got.equal(want) and len(cached.seen) == len(plain.seen)
    for a, b in zip(cached.seen, plain.seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_hidden_later_blocks_need_the_finished_block_once_more():
    """Rows computed: all, the block, then both blocks once."""
    model = tiny()
    with maskaccel.patch(model, [methods.FastDLLM("causal", block=BLOCK)]):
        answer(lambda t: model(t, attention_mask=later_hidden()), methods.LLaDA(steps=6, block=BLOCK), model)
    assert model.rows == [N, 8, 8, 16, 8, 8]


# ---------------------------------------------------------------------------------------------------- approximations
class Oracle:
    """The tiny model in plain torch, with keys and values of its last calls in rows that are not computed."""

    def __init__(self, model: Tiny) -> None:
        self.model, self.kept = model, {}

    @torch.no_grad()
    def __call__(self, tokens: Tensor, rows: slice, mask: Tensor | None) -> Tensor:
        """Logits of all rows, NaN in those that are not computed."""
        model, dtype = self.model, self.model.head.weight.dtype
        places = torch.arange(N)[None].to(dtype)
        hidden = model.embedding(tokens)[:, rows]
        for i, layer in enumerate(model.layers):
            q, k, v = layer.heads(hidden, places[:, rows])
            full = self.kept.setdefault(i, [torch.full((*k.shape[:2], N, k.shape[3]), torch.nan, dtype=dtype)] * 2)
            full = self.kept[i] = [t.clone() for t in full]
            full[0][:, :, rows], full[1][:, :, rows] = k, v
            scores = q @ full[0].mT / k.shape[-1] ** 0.5
            if mask is not None:
                seen = mask[:, None, None, :].expand(-1, 1, N, -1) if mask.dim() == 2 else mask
                scores = scores.masked_fill(~seen[:, :, rows], -torch.inf)
            hidden = layer.after(hidden, scores.softmax(-1) @ full[1])
        logits = torch.full((*tokens.shape, MASK), torch.nan, dtype=dtype)
        logits[:, rows] = 6 * model.head(hidden)
        return logits


CALLS: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {  # two blocks of four steps
    "dual": ({}, [(0, 24), (8, 16), (8, 16), (8, 16), (0, 24), (16, 24), (16, 24), (16, 24)]),
    "prefix": ({"cache": "prefix"}, [(0, 24), (8, 24), (8, 24), (8, 24), (0, 24), (16, 24), (16, 24), (16, 24)]),
    "refresh": ({"refresh": 2}, [(0, 24), (8, 16), (0, 24), (8, 16), (0, 24), (16, 24), (0, 24), (16, 24)]),
    "prompt": (
        {"refresh": 2, "prompt_refresh": 5},
        [(0, 24), (8, 16), (8, 24), (8, 16), (8, 24), (16, 24), (0, 24), (16, 24)],
    ),
    "prefix, prompt": (
        {"cache": "prefix", "refresh": 3, "prompt_refresh": 6},
        [(0, 24), (8, 24), (8, 24), (8, 24), (8, 24), (16, 24), (16, 24), (0, 24)],
    ),
}


@pytest.mark.parametrize("masked", ["none", "padding", "pairs"])
@pytest.mark.parametrize("case", CALLS)
def test_logits_are_those_of_stale_keys_and_values(case, masked):
    settings, calls = CALLS[case]
    mask = {"none": None, "padding": torch.ones(2, N).bool(), "pairs": torch.rand(2, 1, N, N) > 0.3}[masked]
    if masked == "padding":
        mask[1, :3] = False
    if masked == "pairs":
        mask = mask | torch.eye(N).bool()
    model, head, steps = tiny(), Recorder(), []
    given = torch.cat([prompt(), torch.full((2, LENGTH), MASK)], 1)
    with maskaccel.patch(model, [methods.FastDLLM(**settings)]):
        methods.LLaDA(steps=8, block=BLOCK).sample(
            lambda t: model(t, attention_mask=mask), given, MASK, head=head, cache=model,
            on_step=lambda _, tokens: steps.append(tokens),
        )  # fmt: skip
    assert model.rows == [last - first for first, last in calls]
    plain, truth = Oracle(model), Oracle(tiny().double())
    for step, (tokens, logits) in enumerate(zip([given, *steps], head.seen, strict=False)):
        rows = slice(*calls[step])
        block = slice(PROMPT, PROMPT + BLOCK) if step < 4 else slice(PROMPT + BLOCK, N)
        expected, exact = (oracle(tokens, rows, mask)[:, block] for oracle in (plain, truth))
        free = tokens[:, block] == MASK
        where = free[:, :, None].expand(-1, -1, MASK)
        size = int(free.sum(1).max())
        assert free.sum(1).eq(size).all()
        picked = [t[where].view(2, size, MASK) for t in (expected, exact)]
        assert_close_to_truth(logits, picked[0], picked[1], what=f"logits of step {step}", magnitude=1.0)


def test_stale_keys_differ():
    """Otherwise the oracle above would show nothing."""
    model, fresh, stale = tiny(), Recorder(), Recorder()
    for head, refresh in ((fresh, 1), (stale, None)):
        with maskaccel.patch(model, [methods.FastDLLM(refresh=refresh)]):
            answer(model, methods.LLaDA(steps=8, block=BLOCK), model, head=head)
    assert (fresh.seen[0] - stale.seen[0]).abs().max() == 0
    assert (fresh.seen[1] - stale.seen[1]).abs().max() > 1e-3


def test_the_prefix_cache_is_that_of_transformers():
    """Against the model's own cache cut to the prefix, as the authors do it."""
    model, cached = llama(), Recorder()
    steps: list[Tensor] = []
    given = torch.cat([prompt(), torch.full((2, LENGTH), MASK)], 1)
    with maskaccel.patch(model, [methods.FastDLLM("prefix")]):
        methods.LLaDA(steps=8, block=BLOCK).sample(
            model, given, MASK, head=cached, cache=model, on_step=lambda _, tokens: steps.append(tokens)
        )
    for step, tokens in enumerate([given, *steps[:-1]]):
        start = PROMPT + BLOCK * (step // 4)
        with torch.no_grad():
            if step % 4 == 0:
                kept = DynamicCache(config=model.config)
                logits = model(tokens, past_key_values=kept).logits[:, start:]
                kept.crop(start - N)
            else:
                mine = copy.deepcopy(kept)
                logits = model(tokens[:, start:], past_key_values=mine).logits
        free = tokens[:, start : start + BLOCK] == MASK
        want = torch.stack([rows[f] for rows, f in zip(logits[:, :BLOCK], free, strict=True)])
        torch.testing.assert_close(cached.seen[step], want, rtol=1e-5, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------- calls
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_other_calls_and_removal_are_bit_exact(make):
    model, tokens = make(), prompt()
    before = {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()}
    want = model(tokens).logits
    patch = maskaccel.patch(model, [methods.FastDLLM()])
    assert model(tokens).logits.equal(want)
    first = answer(model, SAMPLERS["blocks"], model)
    assert model(tokens).logits.equal(want)
    assert answer(model, SAMPLERS["blocks"], model).equal(first)  # a run leaves nothing behind
    assert answer(copy.deepcopy(model), SAMPLERS["blocks"]).shape == first.shape
    held = copy.deepcopy(model)
    assert answer(held, SAMPLERS["blocks"], held).equal(first)
    patch.remove()
    assert {name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()} == before
    assert model(tokens).logits.equal(want)


def test_inference_mode_and_a_compiled_model():
    model, sampler = tiny(), methods.LLaDA(steps=2)
    with maskaccel.patch(model, [methods.FastDLLM()]):
        want = answer(model, sampler, model)
        with torch.inference_mode():
            assert answer(model, sampler, model).equal(want)
        model.compile(backend="eager")
        assert answer(model, sampler, model).equal(want)


def test_a_sample_does_not_depend_on_its_batch():
    model = tiny()
    with maskaccel.patch(model, [methods.FastDLLM()]):
        both = answer(model, SAMPLERS["blocks"], model)
        for i in range(2):
            alone = SAMPLERS["blocks"].generate(model, prompt()[i : i + 1], LENGTH, MASK, cache=model)
            assert alone.equal(both[i : i + 1])


def test_the_head_is_run_on_the_block():
    model = llama()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, given, out: seen.append(out.shape[1]))
    with maskaccel.patch(model, [methods.FastDLLM("prefix")]):
        answer(model, SAMPLERS["blocks"], model)
    assert seen == [BLOCK] * 8


@pytest.mark.parametrize("mask", [False, True])
def test_a_single_row_takes_one_more_along(mask):
    model = llama()
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, given, out: seen.append(out.shape[1]))
    keys = torch.ones(2, N).long() if not mask else torch.ones(2, 1, N, N).bool()
    if not mask:
        keys[1, :2] = 0
    with maskaccel.patch(model, [methods.FastDLLM(refresh=None)]):
        found = methods.LLaDA(threshold=2.0, block=5).generate(
            lambda t: model(t, attention_mask=keys), prompt(), LENGTH, MASK, cache=model
        )
    assert seen == [N, 5, 5, 5, 5] * 3 + [N]
    with maskaccel.patch(model, [methods.FastDLLM("causal", block=1)]):
        seen.clear()
        ones = torch.ones(N, N).tril().bool()[None, None]
        call = functools.partial(model, attention_mask=ones)
        found = methods.LLaDA(steps=LENGTH, block=1).generate(call, prompt(), LENGTH, MASK, cache=model)
    assert seen == [N] + [2] * (LENGTH - 1)
    assert found.equal(methods.LLaDA(steps=LENGTH, block=1).generate(call, prompt(), LENGTH, MASK))


def test_padding_of_a_model_that_repeats_its_keys_for_masks_alone():
    """The block's own part of the mask hides nothing, so that transformers drops it: it groups the queries, and calls
    the attention causal where its module does not say otherwise."""
    model, padding = llama(), torch.ones(2, N).bool()
    model.model.layers[0].self_attn.is_causal = True
    padding[1, :3] = False
    found = []
    for mask in (padding.long(), padding[:, None, None, :].expand(-1, 1, N, N)):
        head = Recorder()
        with maskaccel.patch(model, [methods.FastDLLM()]):
            call = functools.partial(model, attention_mask=mask)
            found.append((answer(call, SAMPLERS["blocks"], model, head=head), head.seen))
    assert found[0][0].equal(found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=2e-5)


def test_places_that_a_call_gives():
    model = tiny()
    places = (torch.arange(N)[None] - torch.tensor([[0], [3]])).clamp(min=0)
    call = functools.partial(model, position_ids=places, attention_mask=later_hidden())
    want = answer(call, SAMPLERS["blocks"])
    with maskaccel.patch(model, [methods.FastDLLM("causal", block=BLOCK)]):
        assert answer(call, SAMPLERS["blocks"], model).equal(want)


def test_two_calls_a_step_have_caches_of_their_own():
    model = tiny()
    sampler = methods.LLaDA(steps=8, block=BLOCK, guidance=0.7)
    with maskaccel.patch(model, [methods.FastDLLM()]):
        together = answer(model, sampler, model)

        def apart(tokens: Tensor) -> Tensor:
            without = tokens.clone()
            without[:, :PROMPT] = MASK
            cond, uncond = model(tokens).logits, model(without).logits
            return uncond + 1.7 * (cond - uncond)

        assert answer(apart, methods.LLaDA(steps=8, block=BLOCK), model).equal(together)


def test_levels_of_a_block_are_of_one_block():
    model = tiny()
    with maskaccel.patch(model, [methods.FastDLLM()]):
        tokens = torch.cat([prompt(), torch.full((2, LENGTH), MASK)], 1)
        methods.DUS(block=BLOCK).sample(model, tokens, MASK, cache=model)
    assert model.rows == [N, BLOCK, BLOCK] * 2


@pytest.mark.parametrize("storage", [KVStorage(offload=True), KVStorage(fp8=True)])
def test_storage(storage):
    model, head, plain = tiny(), Recorder(), Recorder()
    for kept, seen in ((KVStorage(), plain), (storage, head)):
        with maskaccel.patch(model, [methods.FastDLLM(storage=kept)]):
            answer(model, methods.LLaDA(steps=4), model, head=seen)
    bound = 0.0 if storage.offload else 0.5
    assert (head.seen[1] - plain.seen[1]).abs().max() <= bound


# ------------------------------------------------------------------------------------------------------------ errors
class Unplaced(nn.Module):
    """A model that counts places by itself."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return F.scaled_dot_product_attention(*[tokens[:, None, :, None].float()] * 3)[:, 0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            TinyLLaDA,
            r"attention of TinyLLaDA cannot be reached: MultiheadAttention: MultiheadAttention.forward calls no",
        ),
        (Unplaced, r"Unplaced.forward has no argument 'position_ids'"),
        (lambda: _eager(), r"has attn_implementation='eager'; load the model with 'sdpa'"),
    ],
)
def test_models_that_cannot_be_served(make, text):
    model = make()
    with pytest.raises(PatchError, match=text):
        maskaccel.patch(model, [methods.FastDLLM()])
    assert all("forward" not in vars(m) for m in model.modules())


def _eager() -> nn.Module:
    model = llama()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"cache": "both"}, ValueError, "cache='both'"),
        ({"refresh": 0}, ValueError, "refresh=0"),
        ({"block": 8}, ValueError, "cache='dual', block=8"),
        ({"cache": "causal"}, ValueError, "cache='causal', block=None"),
        ({"cache": "causal", "block": 8, "prompt_refresh": 4}, ValueError, "prompt_refresh"),
        ({"storage": KVStorage(layers=(0,))}, ValueError, r"layers=\(0,\)"),
        ({"storage": 3}, TypeError, "storage=3"),
        ({"positions": 3}, TypeError, "positions=3"),
    ],
)
def test_settings_that_make_no_sense(settings, error, text):
    with pytest.raises(error, match=text):
        methods.FastDLLM(**settings)


def _runs() -> Iterator[Any]:
    """A method, a sampler, a call of the model, and what the error says."""
    blocks, causal = SAMPLERS["blocks"], methods.FastDLLM("causal", block=BLOCK)
    dual, hidden = methods.FastDLLM(), later_hidden()
    yield causal, blocks, lambda m, t: m(t), "sees later blocks of 8 tokens"
    yield methods.FastDLLM("causal", block=12), blocks, lambda m, t: m(t, hidden), "tokens 8 to 15 of 24; with block=12"
    yield dual, blocks, lambda m, t: _tiny()(t), "never called the one that is given as cache"
    yield dual, blocks, lambda m, t: m(t[:, 1:]), r"input_ids of torch.int64 \(2, 23\).*\(B, 24\)"
    yield dual, methods.LLaDA(order="scores", scores=lambda *_: None), lambda m, t: m(t), "ranks by scores"


@pytest.mark.parametrize(("method", "sampler", "call", "text"), list(_runs()))
def test_runs_that_cannot_be_cached(method, sampler, call, text):
    model = tiny()
    with maskaccel.patch(model, [method]):
        with pytest.raises(ValueError, match=text):
            answer(lambda t: call(model, t), sampler, model)
        want = model(prompt()).logits
    assert model(prompt()).logits.equal(want)  # and the model is usable


def test_a_causal_model_and_one_that_is_not_patched():
    model = llama(causal=True)
    with pytest.raises(ValueError, match="cache=LlamaForCausalLM is not patched"):
        answer(model, SAMPLERS["blocks"], model)
    with maskaccel.patch(model, [methods.FastDLLM()]), pytest.raises(ValueError, match="is_causal=True"):
        answer(model, SAMPLERS["blocks"], model)


def test_a_second_call_in_a_step_in_part():
    model, calls = tiny(), []

    def call(tokens: Tensor) -> Any:
        calls.append(1)
        for _ in range(len(calls) - 1):
            model(tokens)
        return model(tokens)

    with (
        maskaccel.patch(model, [methods.FastDLLM()]),
        pytest.raises(ValueError, match="more often than the last whole one, 1 times"),
    ):
        answer(call, SAMPLERS["blocks"], model)


def test_block_ids_are_the_mask_of_the_tests():
    ids = block_ids(N, BLOCK)
    assert (ids[..., :, None] >= ids[..., None, :]).reshape(N, N).equal(later_hidden()[0, 0])
