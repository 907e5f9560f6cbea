"""Published methods, one file each, made of the pieces below."""

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
from .magcache import MagCache
from .pab import PAB
from .scm import SCM
from .skip_branches import SkipBranches
from .skipcache import SkipCache
from .sortblock import Sortblock
from .speca import SpeCa
from .taylorseer import TaylorSeer
from .teacache import TeaCache
from .toca import ToCa

__all__ = [
    "DDT",
    "DMD",
    "FORA",
    "PAB",
    "SCM",
    "ClusCa",
    "DBCache",
    "DPCache",
    "DuCa",
    "FBCache",
    "FasterCache",
    "FoCa",
    "FusedAdaLN",
    "HyCa",
    "MagCache",
    "SkipBranches",
    "SkipCache",
    "Sortblock",
    "SpeCa",
    "TaylorSeer",
    "TeaCache",
    "ToCa",
]
