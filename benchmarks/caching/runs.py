"""What is compared: a run is a text, `Method:option=value+Method` of ours, `library.Method:option=value` of a peer.

`@kind` in a run of ours is the calibration of that kind (`calibrate.py`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from evaluate import parse_call, parse_methods

import maskaccel
from maskaccel import methods

from . import calibrate
from .model import FashionPipeline, Setting

BASELINE = "none"
# name in a run: module and function that set it up
PEERS = {
    "diffusers.FirstBlockCache": ("diffusers_peers", "first_block_cache"),
    "diffusers.TaylorSeer": ("diffusers_peers", "taylorseer"),
    "diffusers.MagCache": ("diffusers_peers", "mag_cache"),
    "diffusers.SeaCache": ("diffusers_peers", "sea_cache"),
    "diffusers.PAB": ("diffusers_peers", "pyramid_attention_broadcast"),
    "diffusers.FasterCache": ("diffusers_peers", "faster_cache"),
    "cache-dit.DBCache": ("cache_dit_peers", "dbcache"),
    "cache-dit.SCM": ("cache_dit_peers", "step_mask"),
}
PACKAGES = {"diffusers": "diffusers", "cache-dit": "cache_dit"}

Reported = Callable[[], dict[str, Any]]


def family(text: str) -> str:
    """The method that gives a run its colour: the first one named."""
    return re.split("[:+]", text, maxsplit=1)[0]


def is_peer(text: str) -> bool:
    """Whether another library makes the run."""
    return family(text) in PEERS


def slug(text: str) -> str:
    """The run's file name."""
    return re.sub(r"[^\w.-]+", "_", text).strip("_")


def ours(text: str) -> list[Any]:
    """The methods of a run of ours.

    Raises:
        ValueError: An argument is not allowed, or there is no calibration of a kind.
    """

    def file(match: re.Match[str]) -> str:
        path = calibrate.path(match[1])
        if not path.exists():
            raise ValueError(f"{path} is not there: `python -m benchmarks.caching calibrate`")
        return repr(str(path))

    return parse_methods(re.sub(r"@(\w+)", file, text))


def _peer(name: str) -> Callable[..., None]:
    module, function = PEERS[name]
    return getattr(importlib.import_module(f".{module}", __package__), function)


def absent(text: str) -> str | None:
    """Why the run cannot be made here; None if it can."""
    if text == BASELINE:
        return None
    if "." in family(text):
        if not is_peer(text):
            return f"{family(text)} is no peer; known are {', '.join(PEERS)}"
        package = PACKAGES[family(text).split(".")[0]]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        try:
            name, options = parse_call(text)
            inspect.signature(_peer(name)).bind(None, None, **options)
        except (ImportError, ValueError, TypeError) as error:
            return str(error)
        return None
    missing = [part for part in (p.partition(":")[0] for p in text.split("+")) if not hasattr(methods, part)]
    if missing:
        return f"maskaccel.methods has no {', '.join(missing)}"
    try:
        ours(text)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


@contextlib.contextmanager
def applied(text: str, pipe: FashionPipeline, setting: Setting) -> Iterator[Reported]:
    """`pipe` with the run's methods; yields a function that says what the library itself reports.

    A peer is not taken off again: the pipeline is the run's own (see `model.load`) and is dropped with it.
    """
    if text == BASELINE:
        yield dict
    elif is_peer(text):
        name, options = parse_call(text)
        _peer(name)(pipe, setting, **options)
        yield dict
    else:
        with maskaccel.patch(pipe, ours(text)) as patch:
            yield lambda: patch.report().as_dict()["activity"]
