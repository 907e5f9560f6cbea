"""Published methods, one file each, made of the pieces below."""

from .clear import CLEAR, ClearPooling
from .clusca import ClusCa
from .dbcache import DBCache, FBCache
from .ddt import DDT
from .dmd import DMD
from .dpcache import DPCache
from .duca import DuCa
from .fastercache import FasterCache
from .foca import FoCa
from .fora import FORA
from .fused_adaln import FusedAdaLN
from .hyca import HyCa
from .liteattention import LiteAttention
from .magcache import MagCache
from .mask2dit import Mask2DiT
from .pab import PAB
from .radial import RadialAttention
from .rettention import Rettention
from .scm import SCM
from .skip_branches import SkipBranches
from .skipcache import SkipCache
from .sliding_tile import SlidingTile
from .sortblock import Sortblock
from .speca import SpeCa
from .taylorseer import TaylorSeer
from .teacache import TeaCache
from .toca import ToCa

__all__ = [
    "CLEAR",
    "DDT",
    "DMD",
    "FORA",
    "PAB",
    "SCM",
    "ClearPooling",
    "ClusCa",
    "DBCache",
    "DPCache",
    "DuCa",
    "FBCache",
    "FasterCache",
    "FoCa",
    "FusedAdaLN",
    "HyCa",
    "LiteAttention",
    "MagCache",
    "Mask2DiT",
    "RadialAttention",
    "Rettention",
    "SkipBranches",
    "SkipCache",
    "SlidingTile",
    "Sortblock",
    "SpeCa",
    "TaylorSeer",
    "TeaCache",
    "ToCa",
]
