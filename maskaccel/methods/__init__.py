"""Published methods, one file each, made of the pieces below."""

from .fora import FORA
from .fused_adaln import FusedAdaLN

__all__ = ["FORA", "FusedAdaLN"]
