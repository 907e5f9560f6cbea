"""Every Triton kernel of the step ops against the fp64 reference, run by `test_triton_kernels.py` as its sibling."""

from __future__ import annotations

import inspect

import pytest
import torch
from _numerics import assert_all_close_to_truth
from _triton_cases import BF16, DTYPES, FP32, Case, as_tuple, double, poisoned_memory  # noqa: F401

from maskaccel.ops import _registry
from maskaccel.ops.steps import reference, schema
from maskaccel.ops.steps import triton as steps

steps.register()


def check_step(name: str, *args: object) -> None:
    got = as_tuple(steps.KERNELS[name](*args))
    plain = as_tuple(reference.KERNELS[name](*args))
    truth = as_tuple(reference.KERNELS[name](*map(double, args)))
    assert_all_close_to_truth(got, plain, truth, what=name)
    assert all(t.is_contiguous() for t in got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_relative_difference(dtype: torch.dtype) -> None:
    for shape in ((2, 5, 7), (3, 9000), (1, 1), (0, 4), (2, 0)):
        x, reference, base = torch.randn(3, *shape, generator=torch.Generator().manual_seed(50)).to(dtype)
        check_step("relative_difference", x, reference, None)
        check_step("relative_difference", x, reference, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [None, "B1D", "1FD", "BND", "chunk3"])
def test_combine_history(gate: str | None, dtype: torch.dtype) -> None:
    case = Case(51, dtype, (2, 6, 24), FP32 if gate == "1FD" else None)
    history = case.normal(2, 5, 6, 24).transpose(0, 1)[:3]  # strides of K and B are free
    for weights in (case.normal(3, dtype=FP32), case.normal(3, 24, dtype=FP32)):
        for x in (None, case.x()):
            check_step("combine_history", history, weights, x, case.mod(gate))
    check_step("combine_history", history[:1, :0], weights[:1], None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate", [None, "B1D", "1FD", "BND", "chunk3", "BD"])
def test_combine_sites(gate: str | None, dtype: torch.dtype) -> None:
    case = Case(53, dtype, (2, 2, 24), FP32 if gate == "1FD" else None)
    history = case.normal(2, 4, 2, 2, 24).permute(1, 2, 0, 3, 4)  # strides of S, K and B are free
    gates = None if gate is None else torch.stack([case.mod(gate) for _ in range(4)])
    for shape, x in (((2,), None), ((4, 2), case.x()), ((4, 2, 24), case.x())):
        check_step("combine_sites", history, case.normal(*shape, dtype=FP32), x, gates)
    check_step("combine_sites", history[:1, :1, :0], case.normal(1, dtype=FP32), None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_gram(per_sample: bool, dtype: torch.dtype) -> None:
    for terms, shape in ((1, (2, 3, 40)), (3, (2, 5, 7)), (16, (1, 2, 33)), (5, (2, 90, 100)), (2, (0, 3, 8))):
        case = Case(52, dtype, shape)
        history = case.normal(shape[0], terms, *shape[1:]).transpose(0, 1)
        check_step("gram", history, per_sample)
        got = steps.KERNELS["gram"](history, per_sample)
        assert got.dtype == torch.float64 and torch.equal(got, got.mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [None, "B1D", "1FD", "BND", "chunk3", "rows"])
def test_with_a_norm(form: str | None, dtype: torch.dtype) -> None:
    case = Case(54, dtype, (2, 6, 24), FP32 if form == "1FD" else None)
    history, reference, vectors = case.normal(2, 5, 6, 24).transpose(0, 1)[:3], case.x("sliced"), case.normal(4, 24)
    rows = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 3, 2, 2, 1, 0]], dtype=torch.int32) if form == "rows" else None
    scale, shift = (case.mod(form) if rows is None else case.normal(4, 24, dtype=case.mod_dtype) for _ in range(2))
    weight, bias, *tables = vectors.to(case.mod_dtype)
    for flags in (0, 1, 2, 4, 5 | 8, 6, 8):
        weights = case.normal(3, dtype=FP32) if flags & 1 else case.normal(3, 24, dtype=FP32)
        dressed = flags & 8 or flags == 4
        rest = (weight, bias, *tables, rows) if dressed else (None, None, None, None, rows)
        end = (scale, shift if flags != 2 else None, *rest, 1e-5, 1.0, flags)
        x, gate = (None, None) if flags == 1 else (case.x(), case.mod("B1D"))
        check_step("combine_history_norm_modulate", history, weights, x, gate, *end)
        check_step("norm_modulate_difference", case.x("transposed"), reference, *end)


def test_with_a_norm_of_nothing_and_of_many_tokens() -> None:
    end = (None,) * 7 + (1e-6, 1.0, 0)
    check_step("combine_history_norm_modulate", torch.zeros(2, 1, 0, 8), torch.ones(2), None, None, *end)
    for shape in ((0, 4, 8), (2, 0, 8), (1, 19, 8)):
        check_step("norm_modulate_difference", torch.ones(shape), torch.ones(shape), *end)
    case = Case(55, FP32, (2, 1031, 5))  # runs of two tokens, the last of one
    check_step("norm_modulate_difference", case.x(), case.x(), *end)


# ------------------------------------------------------------------------------------------- contract and wiring
@pytest.mark.parametrize("name", sorted(steps.KERNELS))
def test_signature_is_the_schema(name: str) -> None:
    text = schema.SCHEMAS[name]
    wanted = [part.split()[-1].split("=")[0] for part in text[1 : text.index(") ->")].split(",")]
    assert list(inspect.signature(steps.KERNELS[name]).parameters) == wanted


def _opcheck_arguments() -> dict[str, tuple]:
    case = Case(60, BF16, (2, 2, 24))
    x, g = case.x(), case.mod("B1D")
    end = (None,) * 5 + (1e-6, 1.0, 0)
    return {
        "relative_difference": (x, x, None),
        "combine_history": (case.normal(2, 2, 2, 24), torch.ones(2), x, g),
        "combine_sites": (case.normal(3, 2, 2, 2, 24), torch.ones(3, 2), x, case.normal(3, 2, 24)),
        "gram": (case.normal(2, 2, 2, 24), True),
        "combine_history_norm_modulate": (case.normal(2, 2, 2, 24), torch.ones(2), x, g, g, g, *end),
        "norm_modulate_difference": (x, x, g, g, *end),
        "scatter_combine": (
            case.normal(2, 2, 2, 24),
            torch.ones(2),
            case.normal(2, 1, 24),
            torch.ones(2, 1, dtype=torch.int32),
            torch.zeros(2, 2, dtype=torch.int32),
            x,
            g,
            1,
            0.5,
        ),
        "kmeans": (x, None, 2, 1, 1),
    }


@pytest.mark.parametrize("name", sorted(steps.KERNELS))
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # opcheck compares runs bit by bit, and poisoned empty results never equal themselves
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(_registry.op("maskaccel_triton", name), _opcheck_arguments()[name], test_utils=tests)
