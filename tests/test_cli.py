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

import maskaccel
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
    for command in ("info", "doctor", "methods", "explain", "demo", "bench"):
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
    assert set(rows) == set(maskaccel.methods.__all__)
    assert rows["FORA"]["kind"] == "lossy"
    assert rows["FusedAdaLN"]["kind"] == "exact"
    assert "interval=3" in rows["FORA"]["arguments"]
    assert "FORA(" in runner.invoke(app, ["methods"]).stdout


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
