"""What `make gpu` needs on a machine without network, packed into one folder that travels beside the source tree.

    python tools/gpu_bundle.py pack                       # .wheels/: wheels, libraries, data; prints all sizes
    python tools/gpu_bundle.py run benchmarks/gpu/run.py  # there: unpack into a temporary folder, then run the script

Wheels are those of requirements/gpu.txt, for the Python of the other machine. Nothing is installed into its
environment: they are unpacked into a folder that the script finds by PYTHONPATH, and torch is never among them. The
library is `maskaccel/lib/libmaskaccel.so` of this tree, built with CUDA kernels (`MASKACCEL_CUDA=1`); that of the
variants (`tools/build_variants.py`) goes along where it was built.
"""

from __future__ import annotations

import argparse
import email
import gzip
import importlib.metadata
import importlib.util
import lzma
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".wheels"
LIBRARY = ROOT / "maskaccel" / "lib" / "libmaskaccel.so"
VARIANTS = ROOT / "build" / "variants" / "libmaskaccel_variants.so"  # benchmarks/gpu/variants.py loads it
REQUIREMENTS = ROOT / "requirements" / "gpu.txt"
SANITIZER = "nvidia-cuda-sanitizer-api==13.5.25"  # 18 MiB; those before 13.4 lack a program that it starts
LIMIT_MIB = 64
DATA_VARIABLE = "MASKACCEL_FASHION_DATA"  # examples/fashion/data.py reads it
# What the wheels need and do not hold: parts of an environment in which torch trains and samples.
PROVIDED = {
    "torch", "numpy", "filelock", "huggingface-hub", "packaging", "pillow", "pytest", "pyyaml", "regex", "requests",
    "safetensors", "transformers",
}  # fmt: skip
_IDX_HEADER = {"images": 16, "labels": 8}  # bytes before the first item; bytes 4 to 7 are the number of items


class BundleError(Exception):
    """The bundle cannot be made as asked."""


# ------------------------------------------------------------------------------------------------------------ wheels
def platforms(machine: str, newest: int = 28) -> list[str]:
    """The tags that wheels for a Linux of glibc 2.`newest` may have: pip takes each literally."""
    return [*(f"manylinux_2_{minor}_{machine}" for minor in range(newest, 4, -1)),
            *(f"manylinux{year}_{machine}" for year in (2014, 2010, 1))]  # fmt: skip


def download(folder: Path, python: str, machine: str, more: Sequence[str] = ()) -> list[Path]:
    """The wheels of the requirements, and of `more`, for another Python, alone."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--implementation", "cp", "--python-version", python, "--dest", str(folder)]  # fmt: skip
    command += [word for tag in platforms(machine) for word in ("--platform", tag)]
    subprocess.run([*command, "--requirement", str(REQUIREMENTS), *more], check=True)
    return sorted(folder.glob("*.whl"))


def normal(name: str) -> str:
    """A package's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def metadata(wheel: Path) -> email.message.Message:
    """The wheel's own description."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def needs(wheels: list[Path], environment: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """`(wheel, name, versions)` of everything that the wheels need in an environment, whoever provides it."""
    from packaging.requirements import Requirement

    for wheel in wheels:
        for line in metadata(wheel).get_all("Requires-Dist") or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({**environment, "extra": ""}):
                yield wheel.name, normal(need.name), str(need.specifier)


def check_wheels(wheels: list[Path], python: str, machine: str) -> list[str]:
    """Whether the wheels fit each other; what the other machine must have beside them, with versions.

    Raises:
        BundleError: Two versions of a package, torch, or something needed that is neither here nor expected there.
    """
    from packaging.specifiers import SpecifierSet

    found: dict[str, str] = {}
    for wheel in wheels:
        about = metadata(wheel)
        name = normal(about["Name"])
        if name in found:
            raise BundleError(f"{wheel.name}: {name} is there in two versions")
        if name in ("torch", "triton"):
            raise BundleError(f"{wheel.name}: {name} comes with the machine")
        found[name] = about["Version"]
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine,
        "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    outside = set()
    for wheel, name, versions in needs(wheels, environment):
        if name in found:
            if found[name] not in SpecifierSet(versions, prereleases=True):
                raise BundleError(f"{wheel} needs {name}{versions}, and the bundle has {found[name]}")
        elif name in PROVIDED:
            outside.add(name + versions)
        else:
            raise BundleError(f"{wheel} needs {name}{versions}: add it to {REQUIREMENTS.relative_to(ROOT)}")
    return sorted(outside)


def unmet(wheels: list[Path]) -> list[str]:
    """What the wheels need of this environment and it does not have, in words."""
    from packaging.specifiers import SpecifierSet

    bundled = {normal(metadata(wheel)["Name"]) for wheel in wheels}
    lacking = set()
    for wheel, name, versions in needs(wheels, {}):
        if name in bundled:
            continue
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            have = ""
        if not have or have not in SpecifierSet(versions, prereleases=True):
            lacking.add(f"{wheel.partition('-')[0]} needs {name}{versions}" + (f", here is {have}" if have else ""))
    return sorted(lacking)


# -------------------------------------------------------------------------------------------------------------- data
def shortened(raw: bytes, kind: str, count: int | None) -> bytes:
    """An IDX file of `images` or `labels` cut to its first `count` items."""
    header, total = _IDX_HEADER[kind], int.from_bytes(raw[4:8], "big")
    if count is None or count >= total:
        return raw
    size = (len(raw) - header) // total
    return raw[:4] + count.to_bytes(4, "big") + raw[8:header] + raw[header : header + count * size]


def pack_data(source: Path, folder: Path, train_images: int | None) -> list[Path]:
    """The Fashion-MNIST files, the training split cut; `.xz`, which is smaller than the `.gz` that they come as."""
    made = []
    for split, count in (("train", train_images), ("t10k", None)):
        for kind, rank in (("images", 3), ("labels", 1)):
            name = f"{split}-{kind}-idx{rank}-ubyte"
            if not (source / f"{name}.gz").is_file():
                raise BundleError(f"{source / name}.gz is missing: install dataset-fashion-mnist, or pass --data none")
            raw = gzip.decompress((source / f"{name}.gz").read_bytes())
            made.append(folder / f"{name}.xz")
            made[-1].write_bytes(lzma.compress(shortened(raw, kind, count), preset=4))
    return made


# -------------------------------------------------------------------------------------------------------------- pack
def tree_bytes() -> int:
    """Bytes of the files that git tracks, and of those that it neither tracks nor ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
        capture_output=True,
    ).stdout.split(b"\0")  # fmt: skip
    paths = {ROOT / os.fsdecode(name) for name in listed if name}
    return sum(path.stat().st_size for path in paths if path.is_file())


def sizes(parts: Mapping[str, int], limit_mib: float) -> str:
    """The sizes as lines.

    Raises:
        BundleError: Together they are above the limit.
    """
    total = sum(parts.values())
    lines = [f"  {size / 2**20:7.2f} MiB  {name}" for name, size in [*parts.items(), ("together", total)]]
    if total > limit_mib * 2**20:
        words = f"above {limit_mib} MiB: take fewer --train-images, or fewer variants (build_variants.py --only)"
        raise BundleError("\n".join([words, *lines]))
    return "\n".join(lines)


def pack_library(library: Path, folder: Path) -> tuple[str, int]:
    """What the packed library is called in the table of sizes, and its size."""
    packed = folder / f"{library.name}.xz"
    raw = library.read_bytes()
    packed.write_bytes(lzma.compress(raw))
    return f"{library.name} ({len(raw) / 2**20:.1f} MiB unpacked)", packed.stat().st_size


def pack(args: argparse.Namespace) -> None:
    """Make the folder anew."""
    if not (args.no_library or (LIBRARY.is_file() and b".nv_fatbin" in LIBRARY.read_bytes())):
        raise BundleError(f"{LIBRARY} has no CUDA kernels: MASKACCEL_CUDA=1 make native, or pass --no-library")
    args.out.mkdir(parents=True, exist_ok=True)
    for old in (*args.out.glob("*.whl"), *args.out.glob("*.xz")):
        old.unlink()
    wheels = download(args.out, args.python, args.machine, [SANITIZER] if args.sanitizer else [])
    outside = check_wheels(wheels, args.python, args.machine)
    parts = {"source tree": tree_bytes(), "wheels": sum(wheel.stat().st_size for wheel in wheels)}
    if not args.no_library:
        parts |= [pack_library(path, args.out) for path in (LIBRARY, VARIANTS) if path.is_file()]
    if args.data != "none":
        made = pack_data(Path(args.data), args.out, args.train_images)
        parts["training images"] = sum(path.stat().st_size for path in made)
    print(f"{args.out} for Python {args.python} on {args.machine}")
    print(sizes(parts, args.limit_mib))
    print("expected there: " + ", ".join(outside))
    if not (args.no_library or VARIANTS.is_file()):
        print("without variants of the attention kernels: GPU_VARIANTS=1 (tools/build_variants.py) compiles them")


# --------------------------------------------------------------------------------------------------------------- run
def unpack_library(packed: Path, library: Path) -> None:
    """Unpack a library into the tree, unless it is not in the bundle or the tree has one as new."""
    if not packed.is_file() or (library.is_file() and library.stat().st_mtime >= packed.stat().st_mtime):
        return
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(".partial")
    partial.write_bytes(lzma.decompress(packed.read_bytes()))
    partial.chmod(0o755)
    partial.replace(library)
    print(f"bundle: {library.relative_to(ROOT)} from {packed.name}", flush=True)


def fits_here(wheel: Path) -> bool:
    """Whether a wheel is for this Python."""
    pythons, abi, _ = wheel.stem.split("-")[-3:]
    return abi in ("none", "abi3") or f"cp{sys.version_info[0]}{sys.version_info[1]}" in pythons.split(".")


def unpack_wheels(wheels: list[Path], site: Path) -> None:
    """Unpack wheels, and say what is amiss: most of a run needs none of them, so that it goes on without."""
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for wheel in wheels:
        if not fits_here(wheel):
            print(f"bundle: {wheel.name} is not for Python {here}: make gpu-bundle GPU_PYTHON={here}", flush=True)
    good = [wheel for wheel in wheels if fits_here(wheel)]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile",
               "--disable-pip-version-check", "--target", str(site)]  # fmt: skip
    done = subprocess.run([*install, *map(str, good)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"bundle: no wheel is unpacked: {done.stderr.strip()[-300:]}", flush=True)
    elif importlib.util.find_spec("packaging"):
        for line in unmet(good):
            print(f"bundle: {line}", flush=True)


def unpack(folder: Path, target: Path) -> dict[str, str]:
    """Unpack a bundle into `target`, the libraries into the tree if that has none as new.

    Returns:
        The environment that finds it all.
    """
    environment = dict(os.environ)
    wheels = sorted(folder.glob("*.whl"))
    if wheels:
        site = target / "site"
        unpack_wheels(wheels, site)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), environment.get("PYTHONPATH"))))
    for library in (LIBRARY, VARIANTS):
        unpack_library(folder / f"{library.name}.xz", library)
    data = sorted(folder.glob("*-ubyte.xz"))
    if data:
        images = target / "fashion-mnist"
        images.mkdir()
        for path in data:
            (images / f"{path.stem}.gz").write_bytes(gzip.compress(lzma.decompress(path.read_bytes()), 1))
        environment.setdefault(DATA_VARIABLE, str(images))
    return environment


def run(args: argparse.Namespace) -> int:
    """Run a script with what the bundle holds, or as it is where there is no bundle; its exit status."""
    with tempfile.TemporaryDirectory(prefix="maskaccel-gpu-") as target:
        environment = unpack(args.bundle, Path(target))
        return subprocess.run([sys.executable, *args.script], env=environment, check=False).returncode


def main() -> int:
    """The command line; 0, 1 for a bundle that cannot be made, or the status of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("pack", help="make the bundle")
    one.add_argument("--out", type=Path, default=FOLDER)
    one.add_argument("--python", default="3.12", help="minor version of the other machine's Python")
    one.add_argument("--machine", default="x86_64")
    one.add_argument("--data", default="/usr/share/datasets/fashion-mnist", help="folder of the .gz files, or none")
    one.add_argument("--train-images", type=int, default=30_000, help="of 60,000")
    one.add_argument("--no-library", action="store_true", help="libraries travel in another way, or are not needed")
    one.add_argument("--sanitizer", action="store_true", help="compute-sanitizer too, for the stage `sanitize`")
    one.add_argument("--limit-mib", type=float, default=LIMIT_MIB, help="of source tree and bundle together")
    one.set_defaults(call=pack)
    other = commands.add_parser("run", help="run a script with the bundle")
    other.add_argument("--bundle", type=Path, default=FOLDER)
    other.add_argument("script", nargs=argparse.REMAINDER, help="the script and its arguments")
    other.set_defaults(call=run)
    args = parser.parse_args()
    try:
        return args.call(args) or 0
    except BundleError as error:
        print(f"gpu_bundle: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
