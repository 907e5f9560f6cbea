"""What has to hold for every way of remembering features: runs, branches, changes within a run, offload, ranks."""

from __future__ import annotations

import dataclasses
import functools
import os
import socket

import pytest
import torch
from zoo.pipelines import MORE_PIPELINES, PIPELINES, sample

import maskaccel
from maskaccel.methods import (
    DDT,
    FORA,
    ClusCa,
    DuCa,
    FasterCache,
    FBCache,
    FusedAdaLN,
    Sortblock,
    SpeCa,
    TaylorSeer,
    ToCa,
)
from maskaccel.state import History, Storage

ALWAYS = {"attention_window": (0, 1000), "uncond_window": (0, 1000), "low_window": (0, 1000), "high_window": (0, 1000)}
METHODS = [
    FORA(interval=3, level="stack"),
    FORA(interval=3, level="block"),
    FORA(interval=3, level="output"),
    FBCache(threshold=0.5),
    TaylorSeer(interval=3, first=2),
    TaylorSeer(interval=3, first=2, level="module"),
    ToCa(ratio=0.3, drift=0, dense=None),
    ToCa(ratio=0.3, score="random"),
    Sortblock(interval=4, beta=0.5, polynomial=(1.0,), low=0, high=1000),
    FasterCache(attention=2, uncond=3, **ALWAYS),
    DuCa(ratio=0.3),
    ClusCa(interval=3, first=2, clusters=3, gamma=0.1),
    DDT(refresh=3),
]
KIND = ("level", "score", "threshold")
each = pytest.mark.parametrize(
    "method", METHODS, ids=lambda m: f"{m.name}-{next((getattr(m, k) for k in KIND if hasattr(m, k)), 0)}"
)


@functools.cache
def built(name):
    return (PIPELINES | MORE_PIPELINES)[name]()


@each
def test_a_run_after_an_exception_equals_one_without(method):
    pipeline, kwargs = built("wan")
    with maskaccel.patch(pipeline, [method, FusedAdaLN()]) as patch:
        expected = sample(pipeline, kwargs)
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory, say")

        handle = pipeline.transformer.blocks[1].ffn.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(pipeline, kwargs, seed=5)
        handle.remove()
        assert patch.report().activity[method.name]["bytes held"] == 0
        assert torch.equal(sample(pipeline, kwargs), expected)


@each
def test_branches_are_told_apart_by_name_not_by_order(method):
    if method.name == "FasterCache":  # what its unconditional branch is made of has to come before it
        method = dataclasses.replace(method, uncond=None)
    model = built("wan")[0].transformer
    given = [torch.randn(1, 6, 24, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]

    def run_with(swapped):
        outs = []
        with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(6) as run:
            for i in range(6):
                x = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(7)) * (1 + 0.01 * i)
                t, out = torch.tensor([900 - 5 * i]), {}
                order = [("cond", given[0]), ("uncond", given[1])]
                for branch, text in order[::-1] if swapped and i % 2 else order:
                    with model.cache_context(branch):
                        out[branch] = model(x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
                outs.append(torch.stack([out["cond"], out["uncond"]]))
                run.step()
            assert patch.report().activity[method.name]["reused"] > 0
        return torch.stack(outs)

    assert torch.equal(run_with(swapped=True), run_with(swapped=False))


@each
def test_batched_and_sequential_guidance_agree(method):
    model = built("dit")[0].transformer

    def run_with(batched):
        outs = []
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 4, 8, 8, generator=generator)
        with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(6) as run:
            for i in range(6):
                x, t = x * 0.98, torch.tensor([900 - 5 * i])
                if batched:
                    both = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.tensor([1, 1000])).sample.chunk(2)
                else:
                    both = []
                    for branch, label in (("cond", 1), ("uncond", 1000)):
                        with run.branch(branch):
                            both.append(model(x, t, torch.tensor([label])).sample)
                outs.append(both[1] + 4 * (both[0] - both[1]))
                run.step()
        return torch.stack(outs)

    torch.testing.assert_close(run_with(batched=False), run_with(batched=True), rtol=1e-4, atol=1e-4)


@each
def test_another_resolution_within_a_run_starts_anew_and_says_so(method):
    model = built("dit")[0].transformer
    with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(6) as run:
        for i in range(6):
            batch = 1 if i < 2 else 2
            x = torch.ones(batch, 4, 8, 8)
            out = model(x, torch.full((batch,), 900 - i), torch.ones(batch, dtype=torch.int64)).sample
            assert torch.isfinite(out).all() and out.shape[0] == batch
            run.step()
        report = patch.report()
    assert report.activity[method.name]["resets"] > 0
    assert any("changed at step 2 of a run" in note for note in report.notes)


@each
def test_two_transformers_of_one_pipeline(method):
    """Wan 2.2 hands over from one model to the other in the middle of the run."""
    pipeline, kwargs = built("wan22")
    plain = sample(pipeline, kwargs, steps=8)
    with maskaccel.patch(pipeline, method) as patch:
        out = sample(pipeline, kwargs, steps=8)
        assert torch.equal(out, sample(pipeline, kwargs, steps=8))
        assert patch.report().activity[method.name]["reused"] > 0
        assert not torch.equal(out, plain)
    assert torch.equal(sample(pipeline, kwargs, steps=8), plain)


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 4e-3), ("fp16", 5e-4), ("fp8", 4e-2)])
def test_narrow_histories_lose_what_their_format_loses(dtype, bound):
    history = History(2, Storage(dtype))
    values = [torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(k)) * 10**k for k in range(2)]
    for k, value in enumerate(values):
        history.push(value, k)
    with torch.no_grad():
        got = history.combine([1.5, -0.5])
    truth = 1.5 * values[1] - 0.5 * values[0]
    error = (got - truth).norm() / truth.norm()
    assert 0 < error < bound
    assert (history.newest() - values[1]).norm() / values[1].norm() < bound
    assert history.newest().dtype == torch.float32


def test_a_difference_is_stored_as_such():
    history, a, b = History(1, Storage("bf16")), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    history.push(a, 0, b)
    assert torch.equal(history.newest(), (a - b).to(torch.bfloat16).float())


@pytest.mark.parametrize("method", [FBCache(threshold=0.5), FORA(interval=3, level="stack")], ids=lambda m: m.name)
def test_skipped_blocks_are_not_loaded_under_offload(method):
    """Weights are fetched by hooks when a module runs; a block that does not run must not fetch its own."""
    accelerate = pytest.importorskip("accelerate")

    class Count(accelerate.hooks.ModelHook):
        loads = 0

        def pre_forward(self, module, *args, **kwargs):
            self.loads += 1
            return args, kwargs

    pipeline, kwargs = PIPELINES["flux"]()
    blocks = [*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks]
    hooks = []
    for block in blocks:
        hooks.append(Count())
        accelerate.hooks.add_hook_to_module(block, hooks[-1])
    with maskaccel.patch(pipeline, method) as patch:
        sample(pipeline, kwargs)
        activity = patch.report().activity[method.name]
    assert activity["reused"] > 0
    assert hooks[-1].loads == activity["computed"] < 6


def _decide_on_rank(rank, port, queue, method):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.set_num_threads(1)
        model = PIPELINES["dit"]()[0].transformer

        class Mesh:
            @staticmethod
            def get_group():
                return torch.distributed.group.WORLD

        shared = type("Shared", (), {"_flattened_mesh": Mesh})
        letters = []
        for parallel in (False, True):
            config = type("Config", (), {"context_parallel_config": shared if parallel else None})
            model._parallel_config = config
            with torch.no_grad(), maskaccel.patch(model, method) as patch, patch.generation(8) as run:
                for i in range(8):
                    # Each rank sees another part of the sequence, which moves at its own pace.
                    x = torch.ones(1, 4, 8, 8) * (1 + i * (0.02 + 0.3 * rank)) + torch.arange(8.0)
                    model(x, torch.tensor([900 - i]), torch.tensor([1]))
                    run.step()
                found = patch.report().activity[method.name]
                letters.append([found.get(name) for name in ("steps", "computed", "reused", "verified", "failed")])
        queue.put((rank, letters))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "method",
    [FBCache(threshold=0.06), SpeCa(threshold=0.03, decay=1.0, floor=0.0, min_drafts=0, first=2)],
    ids=lambda m: m.name,
)
def test_ranks_that_share_a_sequence_decide_alike(method):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_decide_on_rank, args=(rank, port, queue, method)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    alone, together = zip(found[0], found[1], strict=True)
    assert alone[0] != alone[1], "the ranks agree by themselves: the test shows nothing"
    assert together[0] == together[1]
