"""`make gpu`'s runner and stages, as far as they run without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from maskaccel.ops._registry import SPECS

GPU = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"
SCRIPT = GPU / "run.py"
sys.path.insert(0, str(GPU))

import run  # noqa: E402
from pool import Job, Pool  # noqa: E402
from results import Results, read  # noqa: E402
from stage import Context, Target  # noqa: E402
from stages import Plan  # noqa: E402

STAGE = """
import os, time
import stage
SECONDS, EXPECTED, PARALLEL = 1.5, 0.2, 1

def items(context):
    return ["good", "prints", "raises", "wrong", "sticky", "dies", "hangs", "last"]

def run(item, context):
    if item == "raises":
        raise AssertionError("7 is not 8")
    if item == "sticky":
        stage.broken = lambda device: True
        raise RuntimeError("the device is gone")
    if item == "prints":
        print('{"record": {"not": "an answer"}}', flush=True)
    if item == "dies":
        print("before the end", os.getpid(), flush=True)
        os.abort()
    if item == "hangs":
        print(os.getpid(), flush=True)
        time.sleep(60)
    if item == "wrong":
        return {"wrong": {"cuda": "far away"}, "kept": 1}
    earlier = {stage: list(items) for stage, items in context.earlier.items()}
    return {"process": os.getpid(), "tiny": context.tiny, "earlier": earlier, "nan": float("nan")}
"""
PREPARING = """
KEEPS, SECONDS = False, 5.0

def items(context):
    return [f"{name} {item}" for name, items in context.pending.items() for item in items]

def run(item, context):
    return {}
"""
SIDE_BY_SIDE = """
import os, time
from pathlib import Path

def run(item, context):
    folder = Path(__file__).parent
    (folder / f"{os.getpid()}.here").touch()
    while len(list(folder.glob("*.here"))) < 2:
        time.sleep(0.02)
    return {"process": os.getpid()}
"""
UNABLE = """
import os
SECONDS = 5.0
if os.environ["RUNNER_OF_TESTS"] != str(os.getpid()):
    raise OSError("no such device")

def items(context):
    return list("abc")
"""
LISTLESS = """
SECONDS = 1.0

def items(context):
    raise ImportError("no module named missing")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stages of these tests, for this process and for workers."""
    texts = {"stage_of_tests": STAGE, "preparing": PREPARING, "listless": LISTLESS, "side_by_side": SIDE_BY_SIDE,
             "unable": UNABLE}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return tmp_path


def runner(folder: Path, plan: dict[str, Plan], build: str = "a", **options) -> run.Runner:
    """A run with these stages, going on from the file of the folder."""
    path = folder / "gpu.json"
    results = Results(path, {"build": build, "device": "none"}, path if path.exists() else None)
    context = Context("cpu", tiny=True)
    return run.Runner(plan, context, results, began=time.monotonic(), **options)


def go(made: run.Runner) -> tuple[bool, dict]:
    """Whether all was well, and the file."""
    with (made.results.path.parent / "log").open("ab") as log:
        good = made.run(log)
    return good, read(made.results.path)


def test_no_gpu_is_said_in_one_line():
    """Without a device: status 3, one line."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 3, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "no CUDA device" in done.stdout


def test_a_worker_that_dies_or_hangs_costs_one_item(folder):
    """Others run; each failure keeps its reason and output; what is printed is no answer; a second run repairs."""
    made = runner(folder, {"tried": Plan("stage_of_tests", 60)})
    good, found = go(made)
    assert not good
    entries = found["stages"]["tried"]
    assert {name: entry["state"] for name, entry in entries.items()} == {
        "good": "ok", "prints": "ok", "raises": "failed", "wrong": "ok", "sticky": "failed", "dies": "failed",
        "hangs": "failed", "last": "ok",
    }  # fmt: skip
    assert "7 is not 8" in entries["raises"]["error"]
    assert "SIGABRT" in entries["dies"]["error"] and "before the end" in entries["dies"]["output"]
    assert "longer than" in entries["hangs"]["error"] and entries["hangs"]["seconds"] < 10
    assert entries["good"]["record"]["tiny"] is True and entries["good"]["record"]["nan"] == "nan"
    assert entries["good"]["record"]["process"] == entries["prints"]["record"]["process"]
    workers = {entries["good"]["record"]["process"], entries["last"]["record"]["process"]}
    others = {int(entries[name]["output"].split()[-1]) for name in ("dies", "hangs")}
    assert len(workers | others) == 4, "a worker went on after it was lost"
    said = "\n".join(made.summary())
    assert "4 ok, 4 failed" in said and "FAILED tried/wrong: {'cuda': 'far away'}" in said

    again = runner(folder, {"tried": Plan("stage_of_tests", 60)}, resume=True)
    assert again.todo == {"tried": ["raises", "wrong", "sticky", "dies", "hangs"]}
    another = runner(folder, {"tried": Plan("stage_of_tests", 60)}, build="b", resume=True)
    assert len(another.todo["tried"]) == 8 and another.results.earlier() == {"tried": {}}


def test_workers_side_by_side(folder):
    """Items that wait for each other's processes are all done, and the processes gone after it."""
    entries, context = {}, asdict(Context("cpu", tiny=True))
    job = Job("side_by_side", list("abcd"), context, 60.0, 0.1, 2, time.monotonic() + 60, "", entries.__setitem__)
    with (folder / "log").open("ab") as log:
        pool = Pool(log, keep=True)
        assert pool.run(job) is None
        pool.close()
    assert sorted(entries) == list("abcd") and {entry["state"] for entry in entries.values()} == {"ok"}
    processes = {entry["record"]["process"] for entry in entries.values()}
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_the_budget_is_kept(folder, monkeypatch):
    """A run ends before its budget, in the middle of an item too, and names what it left out."""
    monkeypatch.setattr(run, "CLOSING", 0.5)
    made = runner(folder, {"tried": Plan("stage_of_tests", 60)}, budget=4.0, only="good|hangs|last")
    made.modules["tried"].SECONDS = 60.0
    begin = time.monotonic()
    good, found = go(made)
    assert good and time.monotonic() - begin < 7
    done = list(found["stages"].get("tried", {}))
    assert done in (["good"], [])  # none where a worker takes that long to start
    left = [item for item in ("good", "hangs", "last") if item not in done]
    assert found["left_out"] == [{"stage": "tried", "items": left, "why": "the budget was spent"}]


def test_stages_prepare_later_ones_and_one_that_cannot_start_is_named(folder):
    """A preparing stage sees what is pending, also with --resume; a stage without items does not end the run."""
    plan = {"listless": Plan("listless", 9), "first": Plan("preparing", 9), "tried": Plan("stage_of_tests", 9)}
    made = runner(folder, plan, only="good|last", resume=True)
    assert made.todo == {"first": ["tried good", "tried last"], "tried": ["good", "last"]}
    made.todo["tried"].remove("last")
    good, found = go(made)
    assert not good and "no module named missing" in made.problems["listless"]
    assert found["stages"]["tried"]["good"]["record"]["earlier"] == {"first": ["tried good", "tried last"]}
    again = runner(folder, plan, only="good|last", resume=True)
    assert again.todo == {"first": ["tried last"], "tried": ["last"]}


def test_a_stage_whose_workers_do_not_start_is_given_up(folder, monkeypatch):
    """Two starts, no third: the items are left out with the reason, and later stages run."""
    monkeypatch.setenv("RUNNER_OF_TESTS", str(os.getpid()))
    made = runner(folder, {"unable": Plan("unable", 9), "tried": Plan("stage_of_tests", 9)}, only="/[abc]$|good")
    good, found = go(made)
    assert not good and "no such device" in made.problems["unable"]
    (note,) = found["left_out"]
    assert note["items"] == list("abc") and "no such device" in note["why"]
    assert found["stages"]["tried"]["good"]["state"] == "ok"


def test_a_target_below_its_goal_is_missed():
    """Reached, missed, not measured; and goals that are not to be exceeded."""
    assert [Target("", 0.9, got).reached for got in (0.9, 0.89, None)] == [True, False, None]
    assert [Target("", 4.0, got, at_most=True).reached for got in (4.0, 4.1)] == [True, False]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stages", "macro"], "--stages: 'macro' is not known"),
        (["--only", "("], "--only: '(' is no regular expression"),
        (["--budget", "3"], "--budget: 3 is too short"),
        (["--rounds", "0"], "--rounds: 0 is too few"),
    ],
)
def test_bad_words_are_named(words, said, monkeypatch, capsys):
    """An option that makes no sense ends the program before any work."""
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit):
        run.parsed()
    assert said in capsys.readouterr().err


def test_an_expression_that_no_item_holds_is_named(monkeypatch, capsys):
    """Else a misspelt item would end as `all well`."""
    monkeypatch.setattr(sys, "argv", ["run.py", "--dry-run", "--stages", "ceilings,compile", "--only", "gem m"])
    assert run.main() == 1
    assert capsys.readouterr().out == "make gpu: no item of ceilings, compile holds --only 'gem m'; --list names them\n"


def test_dry_run(tmp_path):
    """Every stage of this file at tiny shapes on the CPU: all checks pass, all providers are timed."""
    command = [sys.executable, str(SCRIPT), "--dry-run", "--seeds", "1", "--rounds", "1"]
    command += ["--stages", "ceilings,correctness,compile,micro,attention,host,tokens"]
    command += ["--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert {"device", "torch", "commit", "sources", "library"} <= found["fingerprint"].keys()
    stages = {name: {i: entry["record"] for i, entry in items.items()} for name, items in found["stages"].items()}
    checked = {item.split()[1]: r["state"] for item, r in stages["correctness"].items() if item.startswith("reference")}
    assert set(checked.values()) == {"ok"}
    assert checked.keys() == SPECS.keys(), "an op is not checked (tests/_raw_cases.py)"
    timed = {record["op"] for record in stages["micro"].values()}
    assert timed == SPECS.keys(), "an op is not timed (maskaccel/bench/registry.py)"
    for record in stages["micro"].values():
        assert {"reference", "copy", "eager", "compile"} <= record["providers"].keys(), record
    for record in stages["attention"].values():
        assert {"sdpa", "reference dense", "reference 0.1"} <= record["median_ms"].keys(), record["refused"]
    assert set(stages["tokens"]["no synchronisation"]["calls"].values()) == {"ok"}
    assert not [record["failed"] for record in stages["host"].values() if record.get("failed")]
