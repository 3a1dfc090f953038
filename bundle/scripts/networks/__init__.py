"""Registration networks: every one is called `net(moving, fixed)` and returns a ddf, `PairNetwork` excepted."""

from .attention import CoordinateAttention
from .carl import CARL
from .combinators import Downsample, TwoStep
from .pair import PairNetwork
from .refinement import DisplacementUNet

__all__ = ["CARL", "CoordinateAttention", "DisplacementUNet", "Downsample", "PairNetwork", "TwoStep"]
