"""Reversible patches of models and pipelines."""

from .patch import Context, Method, Patch, patch
from .report import PatchReport
from .route import MaskToken, TokenRoute
from .transaction import PatchError

__all__ = ["Context", "MaskToken", "Method", "Patch", "PatchError", "PatchReport", "TokenRoute", "patch"]
