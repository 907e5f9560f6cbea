"""A patched block under `torch.compile(fullgraph=True)`: no graph break, the same result and gradients."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from torch._inductor.utils import run_and_get_code
from zoo.common import Built, made, randn, run, run_with_gradients
from zoo.flux import wide_single_block

import maskaccel


def dit_block() -> Built:
    block = made(
        BasicTransformerBlock, dim=32, num_attention_heads=2, attention_head_dim=16, norm_type="ada_norm_zero",
        num_embeds_ada_norm=10, attention_bias=True, activation_fn="gelu-approximate", norm_elementwise_affine=False,
    )  # fmt: skip
    return block, {
        "hidden_states": randn(2, 9, 32), "timestep": torch.tensor([1, 7]), "class_labels": torch.tensor([1, 3]),
    }  # fmt: skip


def flux_block() -> Built:
    block = made(FluxTransformerBlock, dim=32, num_attention_heads=2, attention_head_dim=16)
    angles = randn(14, 8, seed=4)
    rotary = tuple(t.repeat_interleave(2, 1) for t in (angles.cos(), angles.sin()))
    return block, {
        "hidden_states": randn(2, 9, 32), "encoder_hidden_states": randn(2, 5, 32, seed=1),
        "temb": randn(2, 32, seed=2), "image_rotary_emb": rotary,
    }  # fmt: skip


@pytest.mark.parametrize("build", [dit_block, flux_block], ids=["dit", "flux"])
def test_no_graph_break(build: Callable[[], Built]) -> None:
    block, kwargs = build()
    with maskaccel.patch(block) as patch:
        expected, expected_grads = run_with_gradients(block, kwargs)
        eager_calls = patch.report().activity["FusedAdaLN"]["fused calls"]
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        explained = torch._dynamo.explain(block)(**kwargs)
        assert explained.graph_break_count == 0, explained.break_reasons
        for got, want in zip(run(compiled, kwargs), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        _, grads = run_with_gradients(compiled, kwargs)
        assert {name.removeprefix("_orig_mod.") for name in grads} == set(expected_grads)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-4)
        assert patch.report().activity["FusedAdaLN"]["fused calls"] == eager_calls, "the compiled call ran in Python"


def test_fused_ops_stay_whole_in_the_graph() -> None:
    """The graph holds our ops as single nodes: a compiler that saw into them would round and schedule its own way."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("maskaccel::norm_modulate", "CPU"):
        pytest.skip("the native library is not built, so plain torch runs instead of an op")
    block, kwargs = wide_single_block()
    graphs = []

    def look(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with maskaccel.patch(block):
        torch._dynamo.reset()
        run(torch.compile(block, fullgraph=True, backend=look), kwargs)
    names = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    for op in ("norm_modulate", "qk_norm_rope", "gate_residual"):
        assert sum(f"maskaccel.{op}." in name for name in names) == 1, names


@pytest.mark.slow
@pytest.mark.parametrize("build", [dit_block, flux_block], ids=["dit", "flux"])
def test_inductor(build: Callable[[], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend, C++ here: one graph, our ops called from its code, the same result and gradients."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    block, kwargs = build()
    with maskaccel.patch(block):
        expected, expected_grads = run_with_gradients(block, kwargs)
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True)
        got, sources = run_and_get_code(run, compiled, kwargs)
        assert len(sources) == 1, "one graph"
        if torch._C._dispatch_has_kernel_for_dispatch_key("maskaccel::norm_modulate", "CPU"):
            assert "torch.ops.maskaccel.norm_modulate" in sources[0]
        for one, want in zip(got, expected, strict=True):
            torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-5)
        _, grads = run_with_gradients(compiled, kwargs)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-4)
