"""A worker process of `make gpu`: runs items of one stage until its input ends.

Started as `worker.py FD MODULE...`: it imports the modules ahead of its first order. Orders come as JSON lines over
stdin, answers go as JSON lines to the file descriptor, so that what a stage or a library prints is never taken for one.
Orders: `{"module", "context": path of a JSON file, "parallel"}`, then any number of `{"item"}`. Answers: `{"ready"}`,
then for each item `{"record"}` or `{"error", "broken"}`: after a broken item the process is of no more use, as after a
sticky CUDA error.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import math
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1


def plain(value: Any) -> Any:
    """What JSON holds; numbers that are none become text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"a record holds a {type(value).__name__}, which JSON does not: {value!r}")


def described(error: BaseException) -> str:
    """Type and message of an error and where it was raised, within 2000 characters."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    place = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
    return f"{type(error).__name__}: {str(error).strip()[:1800]} ({place})"


class Worker:
    """The stage of this process and its context."""

    def __init__(self, order: dict[str, Any]) -> None:
        if order["parallel"] > 1:  # others compile beside this process
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        import stage

        self.interface = stage
        self.context = stage.Context(**json.loads(Path(order["context"]).read_text()))
        self.cuda = self.context.device == "cuda"
        self.stage = importlib.import_module(order["module"])
        if self.cuda:
            import torch

            torch.zeros(1, device="cuda")
            torch.cuda.synchronize()
        self.torch: Any = sys.modules.get("torch")  # a stage may do without
        if self.torch is not None and (not self.cuda or order["parallel"] > 1):
            self.torch.set_num_threads(1)
        gc.freeze()  # a collection after every item then looks at what the item made alone

    def answer(self, item: str) -> dict[str, Any]:
        """Runs an item; what its kernels did wrong shows at the latest when the device is waited for."""
        try:
            record = plain(self.stage.run(item, self.context))
            if self.cuda:
                self.torch.cuda.synchronize()
            return {"record": record}
        except (Exception, SystemExit) as error:
            return {"error": described(error), "broken": self.interface.broken(self.context.device)}
        finally:
            gc.collect()
            if self.cuda:
                self._release()

    def _release(self) -> None:
        try:
            self.torch.cuda.empty_cache()
        except RuntimeError:
            print("the device refuses to free memory", flush=True)


def main() -> None:
    """Answers orders until stdin ends."""
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)  # what a stage starts must not hold the pipe open
    if sys.platform == "linux":  # a worker must not go on without its runner, in a kernel that never ends
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(fd, "w")

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    import paths  # noqa: F401

    for module in sys.argv[2:]:
        importlib.import_module(module)
    worker = None
    for line in sys.stdin:
        order = json.loads(line)
        if "module" in order:
            try:
                worker = Worker(order)
            except Exception as error:
                send({"error": described(error), "broken": True})
                return
            send({"ready": order["module"]})
        else:
            assert worker is not None, "an item came before its stage"
            send(worker.answer(order["item"]))


if __name__ == "__main__":
    main()
