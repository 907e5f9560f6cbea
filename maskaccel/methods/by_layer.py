"""Different methods of sparse attention, or settings of one, in different layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..patching.attention import AttentionSite
from ..state.generation import Generation
from ._attention import SitePolicy, SparseAttention, activity, policies_of


@dataclass(frozen=True)
class ByLayer(SparseAttention):
    """A method of sparse attention for each range of layers; layers in no range stay dense.

    Attributes:
        ranges: `(first layer, layer after the last, method)`, which must not overlap; a last of None is the end.
    """

    ranges: tuple[tuple[int, int | None, SparseAttention], ...]

    name = "ByLayer"
    paper = ""  # it has none: its methods have theirs

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ValueError("ranges=() must hold a range of layers and its method")
        for entry in self.ranges:
            if len(entry) != 3 or type(entry[0]) is not int or type(entry[1]) not in (int, type(None)):
                raise ValueError(f"ranges holds {entry!r}; it must be (first layer, layer after the last, method)")
        end: int | None = 0
        for first, last, method in sorted(self.ranges, key=lambda r: r[0]):
            if not isinstance(method, SparseAttention) or isinstance(method, ByLayer):
                raise TypeError(f"ranges holds {method!r}; it must be a method of sparse attention")
            if end is None or first < end or (last is not None and last <= first):
                raise ValueError(f"ranges holds ({first}, {last}), which is empty or overlaps another")
            end = last

    @property
    def kinds(self) -> tuple[Any, ...]:  # type: ignore[override]
        """What any of the methods takes over."""
        return tuple(dict.fromkeys(kind for _, _, method in self.ranges for kind in method.kinds))

    @property
    def follows_steps(self) -> bool:
        """Whether one of the methods does."""
        return any(method.follows_steps for _, _, method in self.ranges)

    def _method(self, site: AttentionSite) -> SparseAttention | None:
        for first, last, method in self.ranges:
            if first <= site.layer and (last is None or site.layer < last):
                return method
        return None

    def leaves(self, site: AttentionSite) -> str | None:
        """Layers in no range, and what their method leaves."""
        method = self._method(site)
        if method is None:
            return f"layer {site.layer} is in none of the ranges"
        if site.kind not in method.kinds:
            return f"{method.name} does not take {site.kind} attention"
        return method.leaves(site)

    def grid_of(self, site: AttentionSite) -> tuple[int, ...] | None:
        """That of its method."""
        method = self._method(site)
        return None if method is None else method.grid

    def policy(self, site: AttentionSite, generation: Generation) -> SitePolicy:
        """That of its method."""
        method = self._method(site)
        assert method is not None
        return method.policy(site, generation)

    def activity(self, model: nn.Module) -> dict[str, Any]:
        """Of all methods together."""
        methods = {id(method) for _, _, method in self.ranges}
        return activity([policy for policy in policies_of(model) if id(policy.method) in methods])
