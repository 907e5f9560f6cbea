"""The result file of `make gpu`: one for each device, written anew after every item.

    {"format": 2, "fingerprint": of the last run, "builds": {build: fingerprint},
     "stages": {stage: {item: {"state": "ok" | "failed", "build", "seconds", "record" | "error", "output"}}},
     "left_out": [{"stage", "items", "why"}]}

A build is what a figure depends on beside the machine's mood: package, library, torch, Triton and device. Entries of
another build stay until the item is run again, and keep saying so.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT = 2
Entry = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """A result file, or ValueError that says what is wrong with it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as results: {error}") from error
    form = found.get("format") if isinstance(found, dict) else None
    if form != FORMAT:
        raise ValueError(f"{path} is no result file of format {FORMAT} (its format: {form!r})")
    return found


def records(found: dict[str, Any], stage: str) -> dict[str, dict[str, Any]]:
    """The records of a stage by item, of all builds, without what failed."""
    entries = found["stages"].get(stage, {})
    return {item: entry["record"] for item, entry in entries.items() if entry["state"] == "ok"}


class Results:
    """Entries by stage and item, kept in a file.

    Args:
        path: The file; None keeps them in memory alone.
        fingerprint: Of this run.
        before: A result file to go on from, such as `path` itself.
    """

    def __init__(self, path: Path | None, fingerprint: dict[str, Any], before: Path | None = None) -> None:
        self.path, self.build = path, fingerprint["build"]
        self.data: dict[str, Any] = {"format": FORMAT, "fingerprint": fingerprint, "builds": {}, "stages": {}}
        if before is not None:
            old = read(before)
            self.data |= {name: old[name] for name in ("builds", "stages")}
        self.data["builds"][self.build] = fingerprint
        self.data["left_out"] = []

    def done(self, stage: str, item: str) -> bool:
        """Whether this build ran the item, and well."""
        entry = self.data["stages"].get(stage, {}).get(item, {})
        return entry.get("state") == "ok" and entry["build"] == self.build and not entry["record"].get("wrong")

    def earlier(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The records of this build by stage and item."""
        return {
            stage: {item: entry["record"] for item, entry in entries.items() if self.done(stage, item)}
            for stage, entries in self.data["stages"].items()
        }

    def add(self, stage: str, item: str, entry: Entry) -> None:
        """Keeps an entry and writes the file."""
        self.data["stages"].setdefault(stage, {})[item] = {**entry, "build": self.build}
        self.write()

    def leave_out(self, stage: str, items: list[str], why: str) -> None:
        """Notes items that were not run."""
        if items:
            self.data["left_out"].append({"stage": stage, "items": items, "why": why})
            self.write()

    def write(self) -> None:
        """Replaces the file in one step: whoever stops this program finds the old or the new one, whole."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        held = {entry["build"] for entries in self.data["stages"].values() for entry in entries.values()}
        self.data["builds"] = {b: f for b, f in self.data["builds"].items() if b in held | {self.build}}
        partial = self.path.with_name(f"{self.path.name}.part")
        with partial.open("w") as file:
            json.dump(self.data, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
