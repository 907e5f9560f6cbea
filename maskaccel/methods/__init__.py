"""Published methods, one file each, made of the pieces below.

Methods with an `attach` are for `maskaccel.patch` (`PATCHES`); the others are layers and stacks of blocks of their own,
with parameters to train, their losses and schedules, what makes the masks of such layers, or samplers of masked models.
"""

from ._masked_rows import partial_block, per_token, token_mean
from .by_layer import ByLayer
from .clear import CLEAR, ClearPooling
from .clusca import ClusCa
from .d2it import Grains
from .dbcache import DBCache, FBCache
from .ddt import DDT
from .diffit import DiffiTAttention
from .diffmae import DiffMAE
from .dit3d import DiT3DAttention
from .dmd import DMD
from .dpcache import DPCache
from .draft import DraftAttention
from .duca import DuCa
from .dus import DUS
from .editmgt import EditMGT
from .fast_dllm import FastDLLM
from .fastdit3d import FastDiT3DDecoder, FastDiT3DTransformer, VoxelAware
from .fastercache import FasterCache
from .fit import FiTBlocks, Packing
from .foca import FoCa
from .fora import FORA
from .fused_adaln import FusedAdaLN
from .hdit import HDiTAttention
from .hi_mar import HiMAR
from .hyca import HyCa
from .ita_mdt import ITAFA, ITAMDTTransformer
from .lavida_o import LaViDaO
from .lazy_diffusion import LazyDiffusion
from .learned_policy import LearnedPolicy
from .linfusion import LinFusionAttention
from .lit import LiTAttention
from .liteattention import LiteAttention
from .llada import LLaDA
from .llada2 import LLaDA2
from .lmd import LMDSchedule
from .magcache import MagCache
from .mar import MAR
from .mar3d import MAR3D
from .mask2dit import Mask2DiT
from .mask2former import Mask2FormerAttention, predicted_mask
from .maskbit import MaskBit
from .maskdit import MaskDiT, MaskDiTDecoder, MaskDiTTransformer, maskdit_loss
from .masked_cross_attention import MaskedCrossAttention, box_regions, identity_mask, region_mask
from .maskgit import MaskGIT
from .maskgwm import MaskGWMAttention, MaskGWMMasks, MaskGWMReconstruction
from .md4 import MD4, GenMD4
from .mdlm import MDLM
from .mdt import MDT, MDTTransformer, SideInterpolater, power_cosine_scale
from .mediators import MediatorAttention, MediatorSchedule
from .microdit import ExpertChoiceMLP, MicroDiT, MicroDiTTransformer, PatchMixer, kept_edm_loss
from .pab import PAB
from .prime import Prime
from .pt_dit import PTDiTAttention
from .qa_mdt import QAMDTTransformer, RowsAndColumns
from .radial import RadialAttention
from .ras import RAS
from .reference_kv import ReferenceKV
from .rettention import Rettention
from .scm import SCM
from .skip_branches import SkipBranches
from .skipcache import SkipCache
from .sliding_tile import SlidingTile
from .sortblock import Sortblock
from .sparge import SpargeAttn
from .sparse_videogen import SparseVideoGen
from .speca import SpeCa
from .spotedit import SpotEdit
from .sprint import SPRINT, SprintFusion
from .sr_dit import SRDiT, ValueResidual
from .taylorseer import TaylorSeer
from .teacache import TeaCache
from .toca import ToCa
from .tome import ToMe
from .tread import TREAD, route_guidance
from .u_dit import UDiTAttention
from .umd import UMD, UMDSchedule
from .uncage import UNCAGE
from .vsa import VSA
from .x_mdpt import XMDPTTransformer
from .xattention import XAttention
from .yume import YumeTransformer

__all__ = [
    "CLEAR",
    "DDT",
    "DMD",
    "DUS",
    "FORA",
    "ITAFA",
    "MAR",
    "MAR3D",
    "MD4",
    "MDLM",
    "MDT",
    "PAB",
    "RAS",
    "SCM",
    "SPRINT",
    "TREAD",
    "UMD",
    "UNCAGE",
    "VSA",
    "ByLayer",
    "ClearPooling",
    "ClusCa",
    "DBCache",
    "DPCache",
    "DiT3DAttention",
    "DiffMAE",
    "DiffiTAttention",
    "DraftAttention",
    "DuCa",
    "EditMGT",
    "ExpertChoiceMLP",
    "FBCache",
    "FastDLLM",
    "FastDiT3DDecoder",
    "FastDiT3DTransformer",
    "FasterCache",
    "FiTBlocks",
    "FoCa",
    "FusedAdaLN",
    "GenMD4",
    "Grains",
    "HDiTAttention",
    "HiMAR",
    "HyCa",
    "ITAMDTTransformer",
    "LLaDA",
    "LLaDA2",
    "LMDSchedule",
    "LaViDaO",
    "LazyDiffusion",
    "LearnedPolicy",
    "LiTAttention",
    "LinFusionAttention",
    "LiteAttention",
    "MDTTransformer",
    "MagCache",
    "Mask2DiT",
    "Mask2FormerAttention",
    "MaskBit",
    "MaskDiT",
    "MaskDiTDecoder",
    "MaskDiTTransformer",
    "MaskGIT",
    "MaskGWMAttention",
    "MaskGWMMasks",
    "MaskGWMReconstruction",
    "MaskedCrossAttention",
    "MediatorAttention",
    "MediatorSchedule",
    "MicroDiT",
    "MicroDiTTransformer",
    "PTDiTAttention",
    "Packing",
    "PatchMixer",
    "Prime",
    "QAMDTTransformer",
    "RadialAttention",
    "ReferenceKV",
    "Rettention",
    "RowsAndColumns",
    "SRDiT",
    "SideInterpolater",
    "SkipBranches",
    "SkipCache",
    "SlidingTile",
    "Sortblock",
    "SpargeAttn",
    "SparseVideoGen",
    "SpeCa",
    "SpotEdit",
    "SprintFusion",
    "TaylorSeer",
    "TeaCache",
    "ToCa",
    "ToMe",
    "UDiTAttention",
    "UMDSchedule",
    "ValueResidual",
    "VoxelAware",
    "XAttention",
    "XMDPTTransformer",
    "YumeTransformer",
    "box_regions",
    "identity_mask",
    "kept_edm_loss",
    "maskdit_loss",
    "partial_block",
    "per_token",
    "power_cosine_scale",
    "predicted_mask",
    "region_mask",
    "route_guidance",
    "token_mean",
]

PATCHES = tuple(name for name in __all__ if hasattr(globals()[name], "attach"))
"""Names of the methods that `maskaccel.patch` takes."""
