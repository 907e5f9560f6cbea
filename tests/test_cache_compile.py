"""Caching and `torch.compile`: decisions stay outside of graphs, and graphs are made once."""

from __future__ import annotations

import pytest
import torch
from zoo.pipelines import PIPELINES, sample

import maskaccel
from maskaccel.methods import (
    DDT,
    FORA,
    ClusCa,
    DBCache,
    DuCa,
    FasterCache,
    FBCache,
    FusedAdaLN,
    Sortblock,
    TaylorSeer,
    ToCa,
)

METHODS = [
    [DDT(refresh=3), FusedAdaLN()],
    [FORA(interval=3)],
    [FORA(interval=3), FusedAdaLN()],
    [FORA(interval=3, level="stack")],
    [FORA(interval=3, level="output")],
    [FBCache(threshold=1e9, first=2, reduce="any"), FusedAdaLN()],
    [DBCache(threshold=1e9, lead=1, first=2, tail=0)],
    [TaylorSeer(interval=3, first=2, level="block")],
    [ToCa(ratio=0.3, step_weight=0, drift=0, dense=None)],
    [ToCa(ratio=0.3, step_weight=0, drift=0, dense=None, score="random"), FusedAdaLN()],
    [Sortblock(interval=4, beta=0.5, low=0, high=1000), FusedAdaLN()],
    [FasterCache(attention=2, uncond=3, attention_window=(0, 1000), uncond_window=(0, 1000)), FusedAdaLN()],
    [ClusCa(interval=3, first=2, clusters=3, gamma=0.1), FusedAdaLN()],
    [DuCa(ratio=0.3, step_weight=0, drift=0, dense=None), FusedAdaLN()],
]


def blocks_of(model):
    return [block for child in model.children() if isinstance(child, torch.nn.ModuleList) for block in child]


@pytest.mark.parametrize("methods", METHODS, ids=str)
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_compiled_blocks_make_their_graphs_once(name, methods):
    pipeline, kwargs = PIPELINES[name]()
    model = pipeline.transformer
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain = sample(pipeline, kwargs)
    with maskaccel.patch(pipeline, methods) as patch:
        expected = sample(pipeline, kwargs)
        reused = patch.report().activity[methods[0].name]["reused"]
        for block in blocks_of(model):
            block.compile(backend=backend)
        torch.testing.assert_close(sample(pipeline, kwargs), expected, rtol=1e-5, atol=1e-5)
        first = len(graphs)
        sample(pipeline, kwargs, steps=9)
        sample(pipeline, kwargs, seed=1)
        assert len(graphs) == first > 0, "a step compiled something again"
        assert patch.report().activity[methods[0].name]["reused"] > reused > 0
    for block in blocks_of(model):
        assert "compile" not in block.__dict__
        block._compiled_call_impl = None
    assert torch.equal(sample(pipeline, kwargs), plain)


def test_blocks_compile_without_graph_breaks():
    pipeline, kwargs = PIPELINES["flux"]()
    torch._dynamo.reset()
    with maskaccel.patch(pipeline, [FBCache(threshold=0.3), FusedAdaLN()]):
        expected = sample(pipeline, kwargs)
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(sample(pipeline, kwargs), expected, rtol=1e-5, atol=1e-5)


def test_compiling_the_model_compiles_what_is_inside():
    pipeline, kwargs = PIPELINES["dit"]()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with maskaccel.patch(pipeline, TaylorSeer(interval=3, first=2)):
        expected = sample(pipeline, kwargs)
        pipeline.transformer.compile(backend=backend)
        torch.testing.assert_close(sample(pipeline, kwargs), expected, rtol=1e-5, atol=1e-5)
        count = len(graphs)
        sample(pipeline, kwargs, steps=9)
        assert len(graphs) == count > 0
