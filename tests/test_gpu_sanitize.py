"""The stages of `make gpu` that run compute-sanitizer and the GPU tests, with programs that stand in for them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import sanitize  # noqa: E402
from stage import Context  # noqa: E402

import tests as tests_stage  # noqa: E402  isort: skip

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
MEMORY = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void maskaccel::cuda::forward_kernel<cutlass::bfloat16_t, (int)2, (bool)1, (int)3>(maskaccel::cuda::ForwardParams)+0x1230
=========     by thread (0,0,0) in block (3,0,0)
=========     Access at 0x7f6510c00001 is misaligned
=========
========= Invalid __shared__ write of size 4 bytes
=========     at gram_sum_kernel(maskaccel::cuda::GramParams)+0x80 in cuda_gram.cuh:90
=========     by thread (64,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""  # noqa: E501
RACES = """========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at void maskaccel::cuda::sample_logits_kernel<float>(maskaccel::cuda::SampleParams)+0x1f0
=========     and Write access at void maskaccel::cuda::sample_logits_kernel<float>(maskaccel::cuda::SampleParams)+0x2e0 [12 hazards]
=========
========= Warning: Race reported between Write access at void maskaccel::cuda::center_kernel<float>(maskaccel::cuda::ClusterParams)+0xf0
=========     and Read access at void maskaccel::cuda::center_kernel<float>(maskaccel::cuda::ClusterParams)+0x280 [4 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""  # noqa: E501
BARRIER = """========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block
=========     at maskaccel::cuda::free_kernel(maskaccel::cuda::ClusterParams)+0xf0
=========     by thread (37,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
DEAD = (
    "========= COMPUTE-SANITIZER\n========= Error: Target application terminated before first instrumented API call\n"
)


def test_memory_errors_are_told_with_their_kernels():
    found = sanitize.parsed(MEMORY)
    assert (found["errors"], found["warnings"], found["problem"]) == (2, 0, None)
    assert [r["kernel"] for r in found["reports"]] == ["forward_kernel", "gram_sum_kernel"]
    assert found["reports"][0]["what"] == "Invalid __global__ read of size 16 bytes"
    assert found["reports"][0]["details"][-1] == "Access at 0x7f6510c00001 is misaligned"


def test_hazards_that_are_meant_are_counted_apart():
    found = sanitize.parsed(RACES)
    assert (found["errors"], found["warnings"]) == (1, 1)
    assert found["meant"] == {"sample_logits_kernel": 1}
    assert [r["kernel"] for r in found["reports"]] == ["center_kernel"]


def test_barriers_clean_runs_and_ends_before_the_summary():
    assert sanitize.parsed(BARRIER)["reports"][0]["kernel"] == "free_kernel"
    assert sanitize.parsed(CLEAN) == {"errors": 0, "warnings": 0, "reports": [], "meant": {}, "problem": None}
    assert "terminated before first" in sanitize.parsed(DEAD)["problem"]


FAKE = """#!/bin/sh
while [ "$1" != "--log-file" ]; do echo "$1" >> "$SEEN"; shift; done
cp "$SAYS" "$2"
exit $STATUS
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A compute-sanitizer on PATH that says what it is told to and ends as it is told to."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("SAYS", str(tmp_path / "says"))

    def says(text: str, status: int = 0) -> None:
        (tmp_path / "says").write_text(text)
        monkeypatch.setenv("STATUS", str(status))

    return says


@pytest.mark.parametrize(
    ("text", "status", "wrong"),
    [
        (CLEAN, 0, {}),
        (MEMORY, 0, {"memcheck": "2 errors, 0 warnings; Invalid __global__ read of size 16 bytes in forward_kernel"}),
        (CLEAN, 1, {"program": "ended with 1: "}),
        (DEAD, 255, {"memcheck": "no summary", "program": "ended with 255"}),
    ],
    ids=["clean", "errors", "program fails", "tool fails"],
)
def test_an_item_runs_the_tool(fake, tmp_path, text, status, wrong):
    fake(text, status)
    found = sanitize.run("memcheck steps", Context("cuda", tiny=True))
    assert found["wrong"].keys() == wrong.keys()
    assert all(found["wrong"][name].startswith(start) for name, start in wrong.items())
    seen = (tmp_path / "seen").read_text().split()
    assert seen[:4] == ["--tool", "memcheck", "--print-limit", "200"]


def test_items_cover_tools_and_families(fake):
    names = sanitize.items(Context("cuda"))
    assert len(names) == len(set(names)) == 24
    assert names[0] == "memcheck adaln"


def test_without_the_tool_the_only_item_says_so(monkeypatch):
    monkeypatch.setattr(sanitize, "sanitizer", lambda: None)
    (item,) = sanitize.items(Context("cuda"))
    assert "compute-sanitizer is not here" in sanitize.run(item, Context("cuda"))["summary"]


def test_the_tool_of_a_wheel_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    program = tmp_path / "nvidia" / "cu13" / "compute-sanitizer" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sanitize.sanitizer() != str(program), "it cannot be run"
    program.chmod(0o755)
    assert sanitize.sanitizer() in (str(program), "/usr/local/cuda/bin/compute-sanitizer")


REPORT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="t" name="good[cuda]" time="0.5"/>
<testcase classname="t" name="bad[cuda]" time="2.5"><failure message="AssertionError: far
away">def bad():
    assert 0
tests/test_gpu_large.py:12: AssertionError</failure></testcase>
<testcase classname="t" name="broken" time="0.1"><error message="fixture">x</error></testcase>
<testcase classname="t" name="left[cuda]" time="0"><skipped message="one GPU"/></testcase>
</testsuite></testsuites>"""


def test_reports_of_pytest_are_read():
    found = tests_stage.parsed(REPORT)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert found["failures"] == {
        "bad[cuda]": "AssertionError: far away (tests/test_gpu_large.py:12)", "broken": "fixture"
    }  # fmt: skip
    assert found["skips"] == {"one GPU": 1}
    assert next(iter(found["slowest"])) == "bad[cuda]"


def test_parts_are_the_files_with_tests_for_a_gpu():
    files = {name for name, _ in tests_stage.PARTS.values()}
    of_gpu = ("from _targets import", "pytest.mark.gpu, ")
    here = [p for p in Path(__file__).parent.glob("test_gpu_*.py") if p.name != Path(__file__).name]
    assert files == {p.name for p in here if any(word in p.read_text() for word in of_gpu)}
