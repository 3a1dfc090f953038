"""Registration networks: every one is called `net(moving, fixed)` and returns a ddf, `PairNetwork` excepted."""

from .affine import AffineFit
from .attention import CoordinateAttention
from .carl import CARL
from .combinators import Downsample, TwoStep
from .flow import LucasKanade
from .pair import PairNetwork
from .refinement import DisplacementUNet

__all__ = [
    "AffineFit",
    "CARL",
    "CoordinateAttention",
    "DisplacementUNet",
    "Downsample",
    "LucasKanade",
    "PairNetwork",
    "TwoStep",
]
