"""The benchmark registry and runner on tiny shapes. Timings are recorded, never judged."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch

import maskaccel
from maskaccel.bench import __main__ as suite_main
from maskaccel.bench import report, runner, suites
from maskaccel.bench.accuracy import judge, judge_all
from maskaccel.bench.fingerprint import fingerprint
from maskaccel.bench.registry import DTYPES, OPS, dtype_of, find

TINY = {
    "norm_modulate": (2, 12, 40),
    "gate_residual_norm_modulate": (2, 12, 40),
    "gate_residual": (2, 12, 40),
    "qk_norm_rope": (2, 6, 3, 16),
    "gated_activation.swiglu": (2, 6, 64),
    "gated_activation.geglu": (2, 6, 64),
    "relative_difference": (2, 12, 40),
    "combine_history": (3, 2, 12, 40),
    "combine_sites": (4, 2, 2, 12, 40),
    "gram": (3, 2, 12, 40),
    "scatter_combine": (2, 2, 12, 40),
    "scatter_combine.clusters": (2, 2, 12, 40),
    "kmeans": (2, 34, 40),
    "combine_history_norm_modulate": (3, 2, 12, 40),
    "norm_modulate_difference": (2, 12, 40),
    "tile_attention": (2, 70, 3, 16),
    "tile_attention.quarter": (2, 140, 3, 16),
    "merge_attention": (2, 12, 3, 16),
    "linear_attention": (2, 12, 3, 16),
    "attention_column_sums": (2, 12, 3, 16),
    "gather_rows": (2, 12, 40),
    "gather_modulate": (2, 12, 40),
    "scatter_merge": (2, 12, 40),
    "sparse_dense_fuse": (2, 12, 40),
    "merge_tokens": (2, 16, 40),
    "unmerge_tokens": (2, 16, 40),
    "select_active": (2, 12, 40),
    "write_kv_rows": (2, 12, 3, 16),
    "read_kv_rows": (2, 12, 3, 16),
    "confidence_unmask": (2, 12, 40),
}
CPU = torch.device("cpu")
QUICK = runner.Settings(rounds=3, min_seconds=1e-4, warmup=1)


def test_every_public_op_is_registered():
    registered = {name.split(".")[0] for name in OPS}
    # predictors are plain torch, tables and indices are data, and others draw their tokens from other generators
    apart = {"MergeIndex", "RelativePosition", "match_tokens", "random_keep", "segment_attention", "tile_pool"}
    apart |= {"tile_scores", "tile_select", "sample_logits", "unmask_select"}  # the last two: of confidence_unmask
    assert registered == set(maskaccel.ops.__all__) - apart
    assert set(TINY) == set(OPS)


@pytest.mark.parametrize("name", OPS)
def test_shapes_of_models_fit_the_op(name):
    op = OPS[name]
    assert op.shapes
    for shape in op.shapes.values():
        op.check_shape(shape)
    assert op.bytes(TINY[name], torch.float32) == 2 * op.bytes(TINY[name], torch.bfloat16) > 0
    with pytest.raises(ValueError, match=op.dims):
        op.check_shape((1,))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_baseline_computes_the_op(name, dtype):
    op = OPS[name]
    inputs = op.inputs(TINY[name], DTYPES[dtype], CPU)
    truth = op.run(op.in_double(inputs), "reference")
    eager = op.eager(inputs)
    for got, want in zip(eager, truth, strict=True):
        assert got.shape == want.shape
        scale = want.abs().max().item()
        assert (got.double() - want).abs().max().item() <= 8 * torch.finfo(got.dtype).eps * scale + (
            0 if got.dtype == DTYPES[dtype] else 8 * torch.finfo(DTYPES[dtype]).eps * scale
        )


def test_rotary_baseline_is_the_same_without_diffusers(monkeypatch):
    inputs = OPS["qk_norm_rope"].inputs(TINY["qk_norm_rope"], torch.bfloat16, CPU)
    with_diffusers = OPS["qk_norm_rope"].eager(inputs)
    monkeypatch.setitem(sys.modules, "diffusers.models.embeddings", None)
    for got, want in zip(OPS["qk_norm_rope"].eager(inputs), with_diffusers, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backward", [False, True])
def test_runner_checks_and_times_every_provider(name, backward):
    op = OPS[name]
    if backward and not op.wants_grad:
        with pytest.raises(ValueError, match="no backward"):
            runner.run_case(op, TINY[name], torch.bfloat16, CPU, backward=True, settings=QUICK, progress=False)
        return
    case = runner.run_case(
        op, TINY[name], torch.bfloat16, CPU, backward=backward, backends=["reference"], compiled=False, settings=QUICK,
        progress=False,
    )  # fmt: skip
    providers = case.as_dict()["providers"]
    assert set(providers) == {"maskaccel reference", "eager", "copy into", "copy to new"}
    for provider, entry in providers.items():
        assert entry["p20_s"] <= entry["median_s"] <= entry["p80_s"], provider
        assert entry["rounds"] == QUICK.rounds
        assert entry["bytes_per_s"] == pytest.approx(case.bytes / entry["median_s"])
    assert providers["maskaccel reference"]["verdict"]["passed"]


def test_kernel_backends_are_the_default_providers():
    op = OPS["gate_residual"]
    case = runner.run_case(
        op, TINY["gate_residual"], torch.float32, CPU, compiled=False, settings=QUICK, progress=False
    )
    ours = {name for name in case.timings if name.startswith(runner.OURS)}
    assert ours == {runner.OURS + name for name in runner.backends_for(CPU, torch.float32)}
    assert "reference" not in runner.backends_for(CPU, torch.float32)


def _broken(op, change):
    def run(inputs, backend):
        good = op.run(inputs, backend)
        return good if inputs["x"].dtype == torch.float64 else change(good)

    return dataclasses.replace(op, run=run)


def _raise(outputs):
    raise RuntimeError("the kernel fell over")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outputs: tuple(t + 0.5 for t in outputs), "error"),
        (lambda outputs: tuple(t * float("nan") for t in outputs), "not finite"),
        (lambda outputs: tuple(t[:, 1:] for t in outputs), "shape"),
        (lambda outputs: tuple(t.double() for t in outputs), "dtype"),
        (_raise, "fell over"),
    ],
)
def test_wrong_kernel_is_refused_and_not_timed(change, message):
    op = _broken(OPS["norm_modulate"], change)
    case = runner.run_case(
        op, TINY["norm_modulate"], torch.float32, CPU, backends=["reference"], compiled=False, settings=QUICK,
        progress=False,
    )  # fmt: skip
    entry = case.as_dict()["providers"]["maskaccel reference"]
    assert message in entry["refused"]
    assert "median_s" not in entry
    assert not case.timings["maskaccel reference"].samples
    data = report.document([case], QUICK)
    assert "not timed" in report.markdown(data)
    assert "not timed" in report.detail(data["cases"][0])


def test_backend_that_cannot_run_is_an_error_with_its_reason():
    with pytest.raises(ValueError, match="backend='cuda' cannot run here: "):
        runner.run_case(OPS["gate_residual"], (1, 2, 8), torch.float32, CPU, backends=["cuda"], settings=QUICK)


def test_rounds_rotate_the_order():
    order = []
    calls = {name: (lambda n=name: order.append(n)) for name in "abc"}
    case = runner.Case("op", (1,), "float32", "cpu", "forward", 1)
    case.timings = {name: runner.Timing(name) for name in calls}
    settings = runner.Settings(rounds=3, min_seconds=0.0, warmup=1)
    runner._time(case, calls, {}, runner._Clock(CPU), settings, progress=False)
    timed = order[-9:]
    assert [timed[i : i + 3] for i in (0, 3, 6)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_error_rule():
    truth = torch.linspace(-1, 1, 100, dtype=torch.float64)
    plain = truth.float() + 1e-4
    assert judge(truth.float() + 1.9e-4, plain, truth).passed
    assert not judge(truth.float() + 2.1e-4, plain, truth).passed
    assert judge(truth.float(), truth.float(), truth).passed
    worst = judge_all([truth.float(), truth.float() + 1.0], [plain, plain], [truth, truth], ["fine", "off"])
    assert not worst.passed
    assert worst.note.startswith("off: ")
    # a large error of few values hides in the maximum; a small one of all values in the mean
    spiked = plain.clone()
    spiked[0] += 0.1
    verdict = judge(truth.float() + 0.05, spiked, truth)
    assert not verdict.passed
    assert "rms" in verdict.note
    assert math.isnan(judge(truth.float() * float("nan"), plain, truth).error)


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="norm_modulate"):
        find("norm")
    with pytest.raises(ValueError, match="bf16"):
        dtype_of("int8")
    assert dtype_of("bfloat16") is dtype_of("bf16") is torch.bfloat16


def test_suites_hold_valid_cases():
    for suite in suites.SUITES.values():
        entries = list(suite())
        assert entries
        for entry in entries:
            entry.op.check_shape(entry.shape)
            assert not (entry.backward and not entry.op.wants_grad)
    shapes = {(e.op.name, e.shape, e.dtype) for e in suites.cpu()}
    for dtype in ("fp32", "bf16"):
        assert ("norm_modulate", (2, 4096, 1152), dtype) in shapes
        assert ("gate_residual_norm_modulate", (1, 4608, 3072), dtype) in shapes
        assert ("qk_norm_rope", (1, 4608, 24, 128), dtype) in shapes


def test_suite_writes_json_and_table(tmp_path, monkeypatch):
    entry = suites.Entry(OPS["gate_residual"], (1, 8, 16), "fp32", False, "tiny")
    monkeypatch.setitem(suites.SUITES, "cpu", lambda: iter([entry]))
    suite_main.main(["--suite", "cpu", "--out", str(tmp_path), "--rounds", "2", "--no-compile"])
    data = json.loads((tmp_path / "cpu.json").read_text())
    assert data["fingerprint"]["versions"]["torch"] == torch.__version__
    (case,) = data["cases"]
    assert case["model"] == "tiny"
    table = (tmp_path / "cpu.md").read_text()
    assert "| gate_residual | 1x8x16 | fp32 | forward |" in table


def test_fingerprint_is_plain_data():
    mark = fingerprint()
    assert json.loads(json.dumps(mark)) == mark
    assert mark["threads"] == torch.get_num_threads()
    assert mark["native"]["state"] == maskaccel.native.state
