"""The pages on token dropping: names exist, and tables are what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from maskaccel import methods, ops
from maskaccel.ops import tokens

pytest.importorskip("diffusers")
from benchmarks.attention import page
from benchmarks.tokens import ids, partial, side, training, unmask

ROOT = Path(__file__).resolve().parents[1]
TABLES = (
    ("ids", ids.table, "tokens_ids", "tokens"),
    ("training", training.table, "tokens_training", "tokens"),
    ("side", side.table, "tokens_side", "tokens"),
    ("guided", partial.guided_table, "tokens_partial", "tokens"),
    ("partial", partial.table, "tokens_partial", "partial-tokens"),
    ("unmask", unmask.table, "tokens_unmask", "masked-models"),
)


def _page(name):
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("mark", "table", "results", "name"), TABLES)
def test_tables_are_the_measured_ones(mark, table, results, name):
    measured = json.loads((ROOT / "benchmarks" / "results" / f"{results}.json").read_text())
    text = _page(name)
    assert page.put(text, mark, table(measured)) == text


def test_every_op_is_described():
    described = set(re.findall(r"^::: maskaccel\.ops\.(\w+)$", _page("ops"), re.MULTILINE))
    assert set(tokens.__all__) <= described
    listed = set(re.findall(r"`(\w+)`", _page("tokens").split("## Ops")[1].split("## Routes")[0]))
    assert set(tokens.__all__) - {"MergeIndex"} <= listed
    assert all(hasattr(ops, name) for name in listed & set(tokens.__all__))


def test_names_of_methods_exist():
    part = _page("tokens").split("## Training methods")[1]
    described = set(re.findall(r"^::: maskaccel\.methods\.(\w+)$", part, re.MULTILINE))
    assert described and all(hasattr(methods, name) for name in described)
    named = {name for row in re.findall(r"^\| (`.*?) \|", part, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert described <= named | {"SprintFusion", "ValueResidual"} and all(hasattr(methods, name) for name in named)
