"""Run as a script by `maskaccel info`, in a process of its own: one probe a line, as JSON.

A broken library may raise, or end the process; what was printed before still counts. Standard library only, until the
probes themselves import something.
"""

import json
import os
import sys
import traceback

INTERESTING = (
    "libmaskaccel", "libtorch_cpu", "libtorch_cuda", "libc10", "libcudart", "libcuda.", "libcublas.", "libcublasLt",
    "libcudnn.", "libnvrtc.", "libnccl", "libgomp", "libiomp", "libomp", "libmkl_rt", "libstdc++", "libtriton",
)  # fmt: skip


def emit(name, value):
    """One finished probe."""
    print(json.dumps({"probe": name, "value": value}), flush=True)


def attempt(name, function):
    """Run a probe; an exception is its value."""
    print(json.dumps({"begin": name}), flush=True)
    try:
        emit(name, function())
    except BaseException as error:  # a probe must not end the report, whatever it raises
        lines = traceback.format_exception_only(type(error), error)
        emit(name, {"error": "".join(lines).strip()})


def torch_facts():
    """Build of torch and the devices it sees."""
    import torch

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            gpus.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return {
        "version": torch.__version__,
        "file": torch.__file__,
        "cuda build": torch.version.cuda,
        "hip build": getattr(torch.version, "hip", None),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def maskaccel_facts():
    """The package and its native library."""
    import maskaccel
    from maskaccel import ops  # noqa: F401  (loads the native library)

    native = maskaccel.native
    return {
        "version": maskaccel.__version__,
        "file": maskaccel.__file__,
        "native": native.state,
        "native path": str(native.path),
        "native reason": native.reason,
        "native fix": native.fix,
        "isa": native.isa,
        "cuda archs": list(native.cuda_archs),
    }


def backends():
    """Reasons of every backend on every device."""
    import maskaccel

    return maskaccel.info()["backends"]


def loaded():
    """Libraries of interest that this process has mapped, by real path."""
    paths = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.split(maxsplit=5)[-1].strip()
            if path.startswith("/") and os.path.basename(path).startswith(INTERESTING):
                paths.add(os.path.realpath(path))
    return sorted(paths)


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]  # the folder that holds the package, in place of this file's own
    attempt("torch", torch_facts)
    attempt("maskaccel", maskaccel_facts)
    attempt("backends", backends)
    attempt("loaded", loaded)
