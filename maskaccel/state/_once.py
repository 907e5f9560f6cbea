"""What is remembered from step to step belongs to one call of a step: which one, and whether it can be told."""

from __future__ import annotations

from typing import Any

from .generation import Generation

Key = tuple[str, int]  # guidance branch, and number of the attention within the call of its module


class OncePerStep:
    """Names the calls of one attention module; one that comes twice in a step is nobody's.

    A loop that runs the model for each guidance branch without naming them looks like this: whatever is remembered
    could be of the other branch. So nothing is remembered for that name until the run ends.

    Args:
        generation: The model's generation.
        what: What the module does with its memory, for the report.
    """

    def __init__(self, generation: Generation, what: str) -> None:
        self.generation, self.what = generation, what
        self._last: dict[Key, int] = {}
        self._shared: set[Key] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": {}, "_shared": set()}

    def clear(self) -> None:
        """A run begins or ends."""
        self._last.clear()
        self._shared.clear()

    def key(self, part: int) -> Key | None:
        """The name of a call that begins; None if it came twice in this step, or in an earlier one."""
        key = (self.generation.branch_key, part)
        if self._last.get(key) == self.generation.index:
            self._shared.add(key)
            self.generation.note(
                f"the model ran several times a step in one guidance branch, where {self.what}; "
                "name the branches: `with run.branch(...)`"
            )
        self._last[key] = self.generation.index
        return None if key in self._shared else key
