"""`make gpu-bundle`: what is chosen and checked; downloads are left to the target itself."""

from __future__ import annotations

import gzip
import importlib
import lzma
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import gpu_bundle as bundle  # noqa: E402


def wheel(folder: Path, name: str, version: str, *needs: str, module: str = "") -> Path:
    """A pure wheel of one module."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {f"{module or name}.py": f"version = {version!r}\n"}
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/METADATA"] = "\n".join(
        ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {n}" for n in needs), ""]
    )
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


def idx(kind: str, items: list[bytes]) -> bytes:
    dims = (len(items), 2, 2) if kind == "images" else (len(items),)
    return bytes([0, 0, 8, len(dims)]) + b"".join(n.to_bytes(4, "big") for n in dims) + b"".join(items)


def test_needs_are_met_by_the_bundle_or_expected_there(tmp_path: Path) -> None:
    wheels = [
        wheel(tmp_path, "peer", "1.0", "Other_Part>=2", "torch>=2.10", "tomli; python_version < '3.11'",
              "nice; extra == 'x'"),
        wheel(tmp_path, "other.part", "2.1"),
    ]  # fmt: skip
    assert bundle.check_wheels(wheels, "3.12", "x86_64") == ["torch>=2.10"]
    with pytest.raises(bundle.BundleError, match=r"peer.* needs tomli: add it to requirements/gpu\.txt"):
        bundle.check_wheels(wheels, "3.10", "x86_64")


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([("old", "1.0")], r"peer-1.0.* needs old>=2, and the bundle has 1\.0"),
        ([], r"needs old>=2: add it"),
        ([("old", "2.0"), ("old", "2.1")], "old is there in two versions"),
        ([("old", "2.0"), ("torch", "2.11")], "torch comes with the machine"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, others: list[tuple[str, str]], message: str) -> None:
    wheels = [wheel(tmp_path, "peer", "1.0", "old>=2"), *(wheel(tmp_path, *other) for other in others)]
    with pytest.raises(bundle.BundleError, match=message):
        bundle.check_wheels(wheels, "3.12", "x86_64")


def test_what_this_machine_lacks_is_said(tmp_path: Path) -> None:
    wheels = [wheel(tmp_path, "peer", "1.0", "torch>=99", "pytest>=1", "no-such-package")]
    first, second = bundle.unmet(wheels)
    assert first == "peer needs no-such-package" and second.startswith("peer needs torch>=99, here is ")


def test_the_limit_is_of_all_together() -> None:
    parts = {"source tree": 40 * 2**20, "wheels": 20 * 2**20}
    assert "60.00 MiB  together" in bundle.sizes(parts, 60)
    with pytest.raises(bundle.BundleError, match="above 59 MiB: take fewer --train-images"):
        bundle.sizes(parts, 59)


def test_tree_has_what_git_would_send() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    largest = max(path.stat().st_size for path in (ROOT / "examples" / "fashion" / "weights").rglob("*.safetensors"))
    assert largest < bundle.tree_bytes() < largest + 40 * 2**20


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_data_is_cut_to_its_first_items(kind: str) -> None:
    items = [bytes([i] * (4 if kind == "images" else 1)) for i in range(5)]
    assert bundle.shortened(idx(kind, items), kind, 3) == idx(kind, items[:3])
    assert (
        bundle.shortened(idx(kind, items), kind, 9)
        == bundle.shortened(idx(kind, items), kind, None)
        == idx(kind, items)
    )


def test_a_script_runs_with_the_bundle(tmp_path: Path) -> None:
    """Wheels are importable, the data is where the example looks, arguments and status pass through, nothing stays."""
    folder, source = tmp_path / "bundle", tmp_path / "data"
    folder.mkdir(), source.mkdir()
    wheel(folder, "maskaccel_peer", "3.1")
    for split, count in (("train", 4), ("t10k", 2)):
        for kind, rank, size in (("images", 3, 4), ("labels", 1, 1)):
            raw = idx(kind, [bytes([i] * size) for i in range(count)])
            (source / f"{split}-{kind}-idx{rank}-ubyte.gz").write_bytes(gzip.compress(raw))
    made = bundle.pack_data(source, folder, 3)
    assert [path.name for path in made] == sorted((path.name for path in made), key=lambda name: "t10k" in name)
    script = tmp_path / "script.py"
    script.write_text(
        "import gzip, os, sys, maskaccel_peer\n"
        f"raw = gzip.open(os.environ[{bundle.DATA_VARIABLE!r}] + '/train-images-idx3-ubyte.gz').read()\n"
        "print(maskaccel_peer.version, maskaccel_peer.__file__, raw[4:8].hex(), len(raw), *sys.argv[1:])\n"
        "sys.exit(7)\n"
    )
    command = [sys.executable, str(ROOT / "tools" / "gpu_bundle.py"), "run", "--bundle", str(folder), str(script), "-x"]
    environment = {name: value for name, value in os.environ.items() if name != bundle.DATA_VARIABLE}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 7, done.stderr
    version, file, *rest = done.stdout.split()[-5:]
    assert version == "3.1" and rest == ["00000003", str(16 + 3 * 4), "-x"]
    assert not Path(file).exists()


def test_wheels_that_do_not_fit_leave_the_others(tmp_path: Path, capsys) -> None:
    """Those for another Python are named; where nothing can be unpacked, the run goes on without."""
    other = wheel(tmp_path, "other", "1.0")
    other = other.rename(other.with_name("other-1.0-cp39-cp39-manylinux_2_17_x86_64.whl"))
    here = "{}.{}".format(*sys.version_info)
    bundle.unpack_wheels([other, wheel(tmp_path, "maskaccel_peer", "3.1")], tmp_path / "site")
    assert f"{other.name} is not for Python {here}: make gpu-bundle GPU_PYTHON={here}" in capsys.readouterr().out
    assert (tmp_path / "site" / "maskaccel_peer.py").is_file() and not (tmp_path / "site" / "other.py").exists()
    (tmp_path / "torn-1.0-py3-none-any.whl").write_bytes(b"half of a wheel")
    bundle.unpack(tmp_path, tmp_path)
    assert "bundle: no wheel is unpacked: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        ("py3-none-any", True),
        ("py3-none-manylinux2014_x86_64", True),
        ("cp38-abi3-manylinux2014_x86_64", True),
        ("cp{}{}-cp{}{}-manylinux2014_x86_64.manylinux_2_17_x86_64".format(*sys.version_info[:2] * 2), True),
        ("cp27-cp27mu-manylinux2014_x86_64", False),
    ],
)
def test_wheels_for_this_python(tags: str, fits: bool) -> None:
    assert bundle.fits_here(Path(f"peer-1.0-{tags}.whl")) is fits


def test_without_a_bundle_the_script_runs_as_it_is(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("print('ran')")
    command = [
        sys.executable,
        str(ROOT / "tools" / "gpu_bundle.py"),
        "run",
        "--bundle",
        str(tmp_path / "none"),
        str(script),
    ]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "ran\n"


def test_libraries_travel_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, folder = tmp_path / "tree" / "lib" / "libmaskaccel.so", tmp_path / "bundle"
    variants = tmp_path / "tree" / "build" / "variants" / "libmaskaccel_variants.so"
    folder.mkdir(), library.parent.mkdir(parents=True), variants.parent.mkdir(parents=True)
    monkeypatch.setattr(bundle, "LIBRARY", library)
    monkeypatch.setattr(bundle, "VARIANTS", variants)
    monkeypatch.setattr(bundle, "ROOT", tmp_path / "tree")
    library.write_bytes(b"machine code")
    variants.write_bytes(b"variants")
    names = [bundle.pack_library(path, folder)[0].split()[0] for path in (library, variants)]
    assert names == [library.name, variants.name]
    shutil.rmtree(tmp_path / "tree")
    bundle.unpack(folder, tmp_path)
    assert library.read_bytes() == b"machine code" and os.access(library, os.X_OK)
    assert variants.read_bytes() == b"variants"
    library.write_bytes(b"one that was built here")
    bundle.unpack(folder, tmp_path)
    assert library.read_bytes() == b"one that was built here"
    (folder / "libmaskaccel.so.xz").write_bytes(lzma.compress(b"mended machine code"))
    later = library.stat().st_mtime + 10
    os.utime(folder / "libmaskaccel.so.xz", (later, later))
    bundle.unpack(folder, tmp_path)
    assert library.read_bytes() == b"mended machine code", "a second run on one machine kept the first run's library"


def test_variants_go_where_their_stage_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks" / "gpu"), *sys.path])
    assert importlib.import_module("variants").LIBRARY == bundle.VARIANTS


def test_a_bundle_with_variants_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    library, variants, out = tmp_path / "libmaskaccel.so", tmp_path / "libmaskaccel_variants.so", tmp_path / "out"
    library.write_bytes(b".nv_fatbin")
    monkeypatch.setattr(bundle, "LIBRARY", library)
    monkeypatch.setattr(bundle, "VARIANTS", variants)
    monkeypatch.setattr(bundle, "download", lambda *_: [])
    monkeypatch.setattr(bundle, "tree_bytes", lambda: 0)
    command = ["gpu_bundle.py", "pack", "--out", str(out), "--data", "none"]
    monkeypatch.setattr(sys, "argv", command)
    assert bundle.main() == 0
    assert "without variants" in capsys.readouterr().out
    variants.write_bytes(os.urandom(2**20))
    assert bundle.main() == 0
    said = capsys.readouterr().out
    assert "1.00 MiB  libmaskaccel_variants.so (1.0 MiB unpacked)" in said and "without variants" not in said
    assert {path.name for path in out.iterdir()} == {"libmaskaccel.so.xz", "libmaskaccel_variants.so.xz"}
    monkeypatch.setattr(sys, "argv", [*command, "--limit-mib", "0.5"])
    assert bundle.main() == 1
    assert "fewer variants" in capsys.readouterr().err


def test_a_library_without_cuda_kernels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(bundle, "LIBRARY", tmp_path / "libmaskaccel.so")
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "pack", "--out", str(tmp_path / "out")])
    assert bundle.main() == 1
    assert "has no CUDA kernels: MASKACCEL_CUDA=1 make native" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
