"""`fuse_` makes an existing model run fused, in place; `unfuse_` undoes it."""

from resfuse.fuse.fuse import fuse_, unfuse_
from resfuse.fuse.report import FusedModule, FuseReport, LeftModule

__all__ = ["FuseReport", "FusedModule", "LeftModule", "fuse_", "unfuse_"]
