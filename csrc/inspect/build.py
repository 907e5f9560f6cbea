"""Builds the developer module `maskaccel_inspect` into build/inspect.

    python csrc/inspect/build.py [--archs 90a]

Needs nvcc, g++, pybind11, torch's headers and CUTLASS's; no GPU. Try it with
`PYTHONPATH=build/inspect python -c "import maskaccel_inspect as m; print(m.static_attributes())"`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import check_cuda  # noqa: E402


def run(command: list[str]) -> None:
    """Run, and show the end of the output where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:3])} ...\n{(done.stdout + done.stderr)[-3000:]}")


def static_table(cubins: dict[str, Path]) -> str:
    """The C++ table of what each cubin says of its kernels."""
    cuobjdump = check_cuda.find_tool("cuobjdump")
    kernels = [k | {"arch": f"sm_{arch}"} for arch, cubin in cubins.items() for k in check_cuda.usage(cubin, cuobjdump)]
    names = check_cuda.demangle([k["kernel"] for k in kernels])
    rows = "".join(
        f'    {{"{names[k["kernel"]]}", "{k["arch"]}", {k["registers"]}, {k["stack"]}, {k["local"]}, {k["shared"]}}},\n'
        for k in kernels
    )
    return (
        "#pragma once\nnamespace maskaccel::inspect {\n"
        "struct StaticRow { const char *kernel, *arch; int registers, stack, local, shared; };\n"
        f"constexpr StaticRow kStaticTable[] = {{\n{rows}}};\n}}\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", type=lambda s: re.split("[,;]", s), default=["90a"], help="targets, such as 80,90a")
    args = parser.parse_args()
    import pybind11

    out = ROOT / "build" / "inspect"
    out.mkdir(parents=True, exist_ok=True)
    try:
        nvcc = check_cuda.find_tool("nvcc")
        cubins = {}
        objects = []
        for arch in args.archs:
            cubins[arch] = out / f"kernels_{arch}.cubin"
            run(check_cuda.compile_command(HERE / "kernels.cu", arch, cubins[arch], nvcc))
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in args.archs]
        for source in (HERE / "kernels.cu", ROOT / "csrc" / "common" / "cuda_device.cu"):
            command = check_cuda.compile_command(source, args.archs[0], out / f"{source.stem}.o", nvcc)
            command[command.index("-cubin")] = "-c"
            at = next(i for i, word in enumerate(command) if word.startswith("-arch="))
            command[at : at + 1] = [*codes, "-Xcompiler", "-fPIC"]
            run(command)
            objects.append(str(out / f"{source.stem}.o"))
        (out / "static_table.h").write_text(static_table(cubins))
    except check_cuda.Missing as e:
        raise SystemExit(f"inspect: {e}") from None
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", f"-I{out}"]
    module = out / "module.o"
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", *includes]
    run(["g++", *flags, "-c", str(HERE / "module.cpp"), "-o", str(module)])
    target = out / f"maskaccel_inspect{suffix}"
    run([nvcc, "-shared", "-cudart", "static", "-o", str(target), str(module), *objects])
    print(target)


if __name__ == "__main__":
    main()
