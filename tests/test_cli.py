"""The command line, through typer's runner and as a process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner
from zoo.pipelines import dit

import maskaccel
from maskaccel.calibration import KINDS, Calibration, measure
from maskaccel.cli import doctor as doctor_module
from maskaccel.cli import info as info_module
from maskaccel.cli.app import app, parse_shape

ROOT = Path(__file__).resolve().parents[1]
runner = CliRunner()


def _process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "maskaccel", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def test_help_names_every_command():
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("info", "doctor", "methods", "plan", "calibrate", "explain", "demo", "bench"):
        assert command in result.stdout


def test_info_reports_versions_backends_and_loaded_libraries():
    done = _process("info", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["torch"]["version"] == torch.__version__
    assert data["maskaccel"]["native"] == maskaccel.native.state
    assert data["backends"]["cpu"]["reference"] is None
    by_name = {row["library"]: row for row in data["loaded libraries"]}
    assert by_name["libtorch_cpu"]["belongs to"].startswith("torch ")
    if maskaccel.native.state == "loaded":
        assert by_name["libmaskaccel"]["path"] == os.path.realpath(maskaccel.native.path)


def test_info_survives_a_torch_that_raises(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    done = _process("info", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    assert "broken on purpose" in done.stdout
    assert "python" in done.stdout


def test_info_survives_a_torch_that_ends_the_process(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    data = info_module.collect()
    assert "SIGSEGV" in data["torch"]["error"]
    assert data["cpu"]["cores"]


def test_info_marks_libraries_that_are_not_the_installed_ones():
    owners = {"/venv/nvidia/libcudart.so.13": "nvidia-cuda-runtime 13.0"}
    (row,) = info_module._libraries(["/usr/local/libcudart.so.12"], owners, None)
    assert row["belongs to"] == "system"
    assert "not the installed one" in row["note"]
    twice = info_module._libraries(["/a/libgomp.so.1", "/b/libgomp.so.1"], {}, None)
    assert [row["note"] for row in twice] == ["loaded more than once"] * 2


@pytest.mark.slow
def test_doctor_passes_on_this_machine():
    result = runner.invoke(app, ["doctor", "--json", "--device", "cpu"])
    checks = json.loads(result.stdout)
    failed = [check for check in checks if check["outcome"] == "fail"]
    assert result.exit_code == 0, failed
    ran = {(check["op"], check["backend"]) for check in checks if check["outcome"] == "pass"}
    assert ("norm_modulate", "reference") in ran
    if maskaccel.native.state == "loaded":
        assert ("qk_norm_rope", "cpu") in ran
    assert all(check["note"] for check in checks if check["outcome"] == "unavailable")


def test_doctor_fails_on_a_wrong_kernel(monkeypatch):
    op = doctor_module.OPS["gate_residual"]

    def run(inputs, backend):  # wrong in every dtype but that of the truth
        good = op.run(inputs, backend)
        return good if inputs["x"].dtype == torch.float64 else tuple(t * 1.01 for t in good)

    monkeypatch.setattr(doctor_module, "OPS", {"gate_residual": dataclasses.replace(op, run=run)})
    monkeypatch.setenv("COLUMNS", "200")
    result = runner.invoke(app, ["doctor", "--device", "cpu"])
    assert result.exit_code == 1
    assert "FAIL gate_residual reference cpu fp32 forward" in result.stdout


def test_doctor_refuses_an_unknown_device():
    result = runner.invoke(app, ["doctor", "--device", "abacus"])
    assert result.exit_code == 2
    assert "abacus" in result.output


def test_methods_lists_every_method():
    result = runner.invoke(app, ["methods", "--json"])
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert set(rows) == set(maskaccel.methods.PATCHES)
    assert rows["FORA"]["kind"] == "lossy"
    assert rows["FusedAdaLN"]["kind"] == "exact"
    assert "interval=3" in rows["FORA"]["arguments"]
    assert rows["FORA"]["arguments"].endswith("storage=Storage()")
    assert all(row["kind"] in ("exact", "lossy") and row["summary"] for row in rows.values())
    assert {name for name, row in rows.items() if not row["paper"]} == {"ByLayer"}  # it holds other methods
    assert all(rows[name]["models"] for name in ("FORA", "FusedAdaLN", "PAB", "DDT", "TeaCache"))
    text = runner.invoke(app, ["methods"]).stdout
    assert "FORA(" in text and rows["DDT"]["models"] in text and rows["DDT"]["paper"] in text


def _plan(*arguments):
    result = runner.invoke(app, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout[: result.stdout.rindex("}") + 1]), result


@pytest.mark.parametrize(
    ("arguments", "letters"),
    [
        (["FORA", "--steps", "7", "--set", "interval=3"], {"": "C..C..C"}),
        (["fora", "--steps", "4", "--set", "interval=2", "--set", "last=1"], {"": "C.CC"}),
        (["TaylorSeer", "--steps", "9", "--set", "first=2", "--set", "interval=3"], {"": "CC..C..C."}),
        (["DDT", "--steps", "6", "--set", "refresh=3"], {"": "C..C.."}),
        (["SCM", "--steps", "3", "--set", "policy=(1, 0, 0)"], {"": "C.."}),
        (["FBCache", "--steps", "5", "--set", "last=1"], {"": "C???C"}),
        (["SpeCa", "--steps", "5"], {"": "CCC??"}),
        (["PAB", "--timesteps", "950,900,800,100", "--set", "temporal=None"], {"spatial": "C.CC", "cross": "C..C"}),
        (["FasterCache", "--steps", "5"], {"attention": "CCC.C", "unconditional branch": "CC..."}),
        (["FusedAdaLN"], {}),
    ],
)  # fmt: skip
def test_plan_says_what_each_step_does(arguments, letters):
    data, _ = _plan(*arguments)
    assert {label: one["letters"] for label, one in data["rules"].items()} == letters
    assert "warning" not in data
    for one in data["rules"].values():
        assert one["undecided"] == one["letters"].count("?") and bool(one["decided at run time"]) == (
            "?" in one["letters"]
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["FORA", "--set", "interval=1"],
        ["FORA", "--steps", "3", "--set", "interval=9", "--set", "first=3"],
        ["FBCache", "--set", "threshold=0"],
        ["TeaCache", "--set", "polynomial=flux", "--set", "threshold=0.1"],  # the fit is nowhere below 0.1
        ["PAB", "--timesteps", "999,440,300"],
    ],
)
def test_plan_warns_where_nothing_can_be_reused(arguments):
    data, result = _plan(*arguments)
    assert "can never reuse anything" in data["warning"]
    assert f"warning: {data['warning']}" in result.output


def test_plan_of_a_training_method_and_of_one_that_needs_tensors():
    assert "every step is computed with all tokens" in runner.invoke(app, ["plan", "TREAD", "--set", "seed=3"]).output
    result = runner.invoke(app, ["plan", "SpotEdit"])
    assert result.exit_code != 0 and "SpotEdit needs reference" in result.output


def test_plan_as_text():
    text = runner.invoke(app, ["plan", "TeaCache", "--steps", "4", "--set", "polynomial=(1.0, 0.0)"]).output
    assert "TeaCache(polynomial=(1.0, 0.0)), 4 steps" in text and "C??C  2 computed, 2 undecided" in text
    assert (
        "reused while the sum of changes since the last computed step, mapped by the polynomial, is below 0.25" in text
    )
    assert "it has no step mask: every step is computed (exact)" in runner.invoke(app, ["plan", "FusedAdaLN"]).output
    assert "computed, with attention over some of its tiles (lossy)" in runner.invoke(app, ["plan", "CLEAR"]).output
    assert "fall evenly from 1000" in runner.invoke(app, ["plan", "SkipCache"]).output
    forecast = runner.invoke(app, ["plan", "SCM", "--set", "forecaster=Taylor(2)"])
    assert forecast.exit_code == 0 and "SCM(forecaster=Taylor(2))" in forecast.output


def test_calibrate_the_example_and_a_function_of_ones_own(tmp_path, monkeypatch):
    out = tmp_path / "m.json"
    arguments = ["calibrate", "magnitudes", "--steps", "3", "--call", "class_labels=[1]", "--out", str(out)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = Calibration.load(out, "magnitudes", "DiTTransformer2DModel")
    assert (found.blocks, found.steps, len(found["ratios"])) == (6, 3, 3)
    assert f"use: MagCache(ratios='{out}')" in result.stdout
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from zoo.pipelines import dit\n"
        "import torch\n"
        "def loop(found, number):\n"
        "    with torch.no_grad(), found.generation(3) as run:\n"
        "        for i in range(3):\n"
        "            x = torch.ones(1, 4, 8, 8) + i + number\n"
        "            found.target(x, timestep=torch.tensor([900 - i]), class_labels=torch.tensor([1]))\n"
        "            run.step()\n"
        "def own():\n"
        "    return dit()[0].transformer, loop\n"
    )
    for model, runs in (("zoo.pipelines:dit", "1"), ("mine:own", "2")):
        arguments = ["calibrate", "distances", "--model", model, "--steps", "3", "--runs", runs, "--set", "encoder=all"]
        result = runner.invoke(app, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        found = Calibration.load("distances.json", "distances", "DiTTransformer2DModel")
        assert found["encoder"] == 2 and json.loads(result.stdout)["values"]["encoder"] == 2


def test_calibrate_a_pipeline_in_a_folder(tmp_path):
    pipeline, kwargs = dit()
    pipeline.save_pretrained(tmp_path / "pipe")
    out = tmp_path / "fit.json"
    arguments = ["calibrate", "teacache", "--model", str(tmp_path / "pipe"), "--steps", "6", "--set", "degree=1"]
    calls = ["--call", f"class_labels={kwargs['class_labels']}", "--device", "cpu", "--out", str(out)]
    result = runner.invoke(app, [*arguments, *calls])
    assert result.exit_code == 0, result.output
    with measure(pipeline, "teacache", degree=1) as found:
        pipeline(kwargs["class_labels"], num_inference_steps=6, generator=torch.Generator().manual_seed(0))
    assert Calibration.load(out, "teacache")["polynomial"] == pytest.approx(found.result()["polynomial"], rel=1e-3)


def test_calibrate_lists_its_kinds():
    text = runner.invoke(app, ["calibrate", "--list"]).stdout
    assert all(kind in text for kind in KINDS) and "teacache(tap='modulated', degree=4)" in text


def test_explain_gives_a_reason_for_each_backend():
    result = runner.invoke(app, ["explain", "norm_modulate", "--device", "cpu", "--json"])
    reasons = json.loads(result.stdout)["cpu"]
    assert reasons["reference"] is None
    assert reasons["cuda"] == maskaccel.explain("norm_modulate", torch.empty(0, dtype=torch.bfloat16))["cuda"]
    text = runner.invoke(app, ["explain", "norm_modulate", "--device", "cpu"]).stdout
    assert "cannot: " + reasons["cuda"] in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "no_such_op"], "no_such_op"),
        (["explain", "norm_modulate", "--dtype", "int7"], "int7"),
        (["plan", "NoSuch"], "no method 'NoSuch'; there are ByLayer, CLEAR"),
        (["plan", "FORA", "--set", "interval"], "'interval' is not of the form name=value"),
        (["plan", "FORA", "--set", "interval=2", "--set", "interval=3"], "names interval twice"),
        (["plan", "FORA", "--set", "pace=2"], "FORA has no argument pace; it has interval"),
        (["plan", "FORA", "--set", "interval=0"], "interval=0 must be"),
        (["plan", "SCM", "--set", "forecaster=open('x')"], "open is not known here; known are"),
        (["plan", "MagCache"], "no magnitude ratios"),
        (["plan", "DDT", "--set", "schedule=none.json"], "none.json is no file"),
        (["plan", "DPCache", "--set", "calibration=none.json"], "none.json is no file"),
        (["plan", "PAB", "--timesteps", "1,x"], "x"),
        (["calibrate", "mood"], "kind='mood'"),
        (["calibrate", "distances", "--set", "size=1"], "size=1 is no option"),
        (["calibrate", "distances", "--model", "nowhere"], "model='nowhere' is no folder"),
        (["calibrate", "distances", "--model", "nowhere:f"], "No module named 'nowhere'"),
        (["calibrate", "distances", "--model", "zoo"], "model='zoo' is no folder"),
        (["calibrate", "distances", "--model", str(ROOT / "tests")], "no model_index.json"),
        (["calibrate", "distances", "--out", "/no/such/folder/file.json"], "out='/no/such/folder/file.json'"),
        (["calibrate", "distances", "--call", "foo=1"], "takes no argument foo"),
        (["calibrate", "distances", "--component", "vae9"], "component='vae9'"),
        (["calibrate", "distances", "--dtype", "int7"], "dtype='int7'"),
        (["bench", "no_such_op"], "no_such_op"),
        (["bench", "norm_modulate", "--shape", "2,three,4"], "2,three,4"),
        (["bench", "norm_modulate", "--shape", "2,3"], "batch, tokens, width"),
        (["bench", "norm_modulate", "--dtype", "fp4"], "fp4"),
        (["bench", "norm_modulate", "--backend", "quantum", "--device", "cpu"], "quantum"),
        (["bench", "relative_difference", "--shape", "1,2,8", "--backward", "--device", "cpu"], "no backward"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_bench_times_a_shape_and_prints_json():
    arguments = ["bench", "norm_modulate", "--shape", "1x16x64", "--dtype", "fp32", "--backend", "reference"]
    result = runner.invoke(app, [*arguments, "--device", "cpu", "--rounds", "3", "--no-compile", "--json"])
    assert result.exit_code == 0, result.output
    (case,) = json.loads(result.stdout)["cases"]
    assert case["shape"] == [1, 16, 64]
    assert case["providers"]["maskaccel reference"]["verdict"]["passed"]
    assert case["providers"]["eager"]["median_s"] > 0


def test_bench_list_shows_shapes_of_models():
    result = runner.invoke(app, ["bench", "--list"])
    assert "1,4608,3072" in result.stdout
    assert "FLUX" in result.stdout


def test_parse_shape():
    assert parse_shape("2,4096,1152") == parse_shape("2x4096x1152") == (2, 4096, 1152)
    with pytest.raises(ValueError, match="list of sizes"):
        parse_shape("2,-1")


def test_explain_offers_ops_alone():
    with pytest.raises(ValueError, match="op='MergeIndex' is not known") as found:
        maskaccel.explain("MergeIndex", torch.randn(1))
    assert "merge_tokens" in str(found.value) and "RelativePosition" not in str(found.value)
