"""What a patch did, in words and numbers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class PatchReport:
    """The outcome of `maskaccel.patch`; `print` it, or take `as_dict()`.

    Attributes:
        models: Class name of each patched model.
        sites: (method, class of module, what was done) -> count.
        skipped: (method, class of module, reason) -> count.
        backend: Backend of the fused ops on the model's device.
        activity: Method -> what it did since the patch (counts of calls, hits, bytes kept).
        notes: Anything a person should know.
    """

    models: list[str] = field(default_factory=list)
    sites: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    skipped: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    backend: str = ""
    activity: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for JSON."""

        def rows(counter: Counter[tuple[str, str, str]], last: str) -> list[dict[str, Any]]:
            return [{"method": m, "module": c, last: w, "count": n} for (m, c, w), n in counter.items()]

        return {
            "models": list(self.models),
            "backend": self.backend,
            "patched": rows(self.sites, "action"),
            "skipped": rows(self.skipped, "reason"),
            "activity": {name: dict(values) for name, values in self.activity.items()},
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"patched {', '.join(self.models)}; ops run on the {self.backend} backend"]
        width = max((len(c) for _, c, _ in (*self.sites, *self.skipped)), default=0)
        lines += [f"  {m:12s} {n:4d} x {c:{width}s}  {w}" for (m, c, w), n in self.sites.items()]
        lines += [f"  {m:12s} {n:4d} x {c:{width}s}  not patched: {w}" for (m, c, w), n in self.skipped.items()]
        for name, values in self.activity.items():
            lines.append(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in values.items()))
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
