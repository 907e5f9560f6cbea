"""Reversible patches of models and pipelines."""

from .patch import Context, Method, Patch, patch
from .report import PatchReport
from .transaction import PatchError

__all__ = ["Context", "Method", "Patch", "PatchError", "PatchReport", "patch"]
