"""The wheel, the native library's symbols, and what importing does."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from maskaccel._native import NativeLibrary, native

ROOT = Path(__file__).resolve().parents[1]

# Stands in for CMake: puts a finished library where setup.py asked for it, so that a wheel takes seconds.
FAKE_CMAKE = """#!{python}
import pathlib, shutil, sys
record = pathlib.Path({record!r})
before = record.read_text() if record.exists() else ""
record.write_text(before + " ".join(sys.argv[1:]) + "\\n")
for argument in sys.argv[1:]:
    if argument.startswith("-DMASKACCEL_OUTPUT_DIR="):
        folder = pathlib.Path(argument.split("=", 1)[1])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy({library!r}, folder / "libmaskaccel.so")
"""


def _audit_module():
    spec = importlib.util.spec_from_file_location("audit_wheel", ROOT / "tools" / "audit_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


audit_wheel = _audit_module()
needs_library = pytest.mark.skipif(not native.path.is_file(), reason="the native library is not built (`make native`)")


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture
def source(tmp_path):
    """A copy of what a build reads, without the built library."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "maskaccel", folder / "maskaccel", ignore=shutil.ignore_patterns("__pycache__", "lib"))
    return folder


def _build(source: Path, out: Path, *, path: str = "", **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment, "PATH": path + os.environ["PATH"]}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(out),
        str(source),
    ]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def _fake_cmake(tmp_path: Path) -> tuple[str, Path]:
    bin_folder, record = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    script = bin_folder / "cmake"
    script.write_text(FAKE_CMAKE.format(python=sys.executable, record=str(record), library=str(native.path)))
    script.chmod(0o755)
    return f"{bin_folder}{os.pathsep}", record


@needs_library
def test_native_wheel_has_the_promised_tag_and_contents(source, tmp_path):
    path, record = _fake_cmake(tmp_path)
    built = _build(source, tmp_path / "out", path=path, MASKACCEL_CUDA="0", MASKACCEL_BUILD="native")
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    report = audit_wheel.audit(wheel)
    assert "no other of torch" in report
    configure, build = record.read_text().splitlines()
    assert "-DMASKACCEL_CUDA=OFF" in configure
    assert build.startswith("--build ")
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith("METADATA"))
        text = archive.read(metadata).decode()
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in required) == ["safetensors", "torch", "tqdm", "typer"]


def test_pure_wheel_builds_without_cmake_and_holds_no_library(source, tmp_path):
    built = _build(source, tmp_path / "out", MASKACCEL_BUILD="pure")
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"maskaccel"}
    for folder in ("ops", "patching", "models", "methods", "state", "masks", "cli", "bench"):
        assert f"maskaccel/{folder}/__init__.py" in names


@pytest.mark.parametrize(("name", "value"), [("MASKACCEL_BUILD", "fast"), ("MASKACCEL_CUDA", "yes")])
def test_unknown_build_option_names_the_variable(source, tmp_path, name, value):
    built = _build(source, tmp_path / "out", **{name: value})
    assert built.returncode != 0
    assert f"{name}='{value}' is not known" in built.stderr + built.stdout


@needs_library
def test_library_calls_stable_torch_symbols_only():
    found = audit_wheel.audit_library(native.path)
    assert any(name.startswith("aoti_torch_") for name in found["stable"])
    assert not found["exported"], f"the library exports {found['exported'][:5]}"


def test_audit_refuses_a_library_with_unstable_symbols():
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    with pytest.raises(audit_wheel.AuditError, match="unstable torch symbols"):
        audit_wheel.audit_library(library)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [*names, "tests/test_x.py"], "outside the package"),
        (lambda names: [*names, "maskaccel/ops/adaln/kernel.cu"], "source tree"),
        (lambda names: [n for n in names if not n.endswith(".so")], "lacks maskaccel/lib/libmaskaccel.so"),
        (lambda names: [*names, "maskaccel/libgomp.so"], "other libraries"),
        (lambda names: [n for n in names if not n.endswith("LICENSE")], "lacks the licence"),
    ],
)
def test_audit_refuses_wrong_contents(change, message):
    good = [
        "maskaccel/__init__.py", "maskaccel/py.typed", "maskaccel/cli/app.py", "maskaccel/lib/libmaskaccel.so",
        "maskaccel-0.1.0.dist-info/METADATA", "maskaccel-0.1.0.dist-info/licenses/LICENSE",
    ]  # fmt: skip
    audit_wheel.audit_contents(good)
    with pytest.raises(audit_wheel.AuditError, match=message):
        audit_wheel.audit_contents(change(good))


def test_audit_refuses_a_python_specific_tag(tmp_path):
    wheel = tmp_path / "maskaccel-0.1.0-cp311-cp311-linux_x86_64.whl"
    wheel.write_bytes(b"")
    with pytest.raises(audit_wheel.AuditError, match="py3-none"):
        audit_wheel.audit(wheel)


def test_import_prints_nothing():
    done = _python("import maskaccel, maskaccel.ops, maskaccel.methods")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_package_works_without_the_library():
    code = (
        "import torch, maskaccel\n"
        "assert maskaccel.native.state == 'absent', maskaccel.native\n"
        "x, s = torch.randn(2, 4, 8), torch.randn(2, 8)\n"
        "y = maskaccel.ops.norm_modulate(x, s, s)\n"
        "want = torch.nn.functional.layer_norm(x, (8,), eps=1e-6) * (1 + s[:, None]) + s[:, None]\n"
        "torch.testing.assert_close(y, want)\n"
        "reason = maskaccel.explain('norm_modulate', x)['cpu']\n"
        "assert 'MASKACCEL_NO_NATIVE' in reason, reason\n"
    )
    done = _python(code, MASKACCEL_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr


def test_library_that_cannot_be_loaded_is_incompatible(tmp_path):
    broken = tmp_path / "libmaskaccel.so"
    broken.write_bytes(b"this is no shared object")
    library = NativeLibrary(broken)
    library.load()
    assert library.state == "incompatible"
    assert library.reason
    assert "make native" in library.fix


def test_import_survives_a_broken_torch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('broken on purpose')")
    code = (
        "import maskaccel\n"
        "try:\n    maskaccel.patch\n"
        "except ImportError as error:\n"
        "    assert 'broken on purpose' in str(error) and 'maskaccel info' in str(error)\n"
        "else:\n    raise SystemExit('no error')\n"
    )
    done = _python(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_needs_torch_alone():
    """Of what the tests have installed beside it, the package itself imports nothing."""
    others = "numpy", "diffusers", "transformers", "PIL", "tqdm", "triton"
    code = f"import sys; sys.modules.update(dict.fromkeys({others!r})); from maskaccel import methods as m"
    code += "; print(len(m.PATCHES))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 40, done.stderr


def test_import_leaves_the_compiler_alone():
    """torch brings its compiler in when it is first used: that takes seconds, also in every worker of a data loader."""
    code = "import sys, maskaccel.methods, maskaccel.ops; print(*(m for m in sys.modules if 'torch._dynamo' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stdout + done.stderr
