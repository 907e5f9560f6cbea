"""Published methods, one file each, made of the pieces below."""

from .dbcache import DBCache, FBCache
from .fora import FORA
from .fused_adaln import FusedAdaLN
from .pab import PAB
from .taylorseer import TaylorSeer

__all__ = ["FORA", "PAB", "DBCache", "FBCache", "FusedAdaLN", "TaylorSeer"]
