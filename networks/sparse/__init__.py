"""Sparse 3D tensors: coordinates (topology), the data type (tensor), functions (ops), layers (modules)."""

from networks.sparse.modules import Downsample, SubmanifoldConv3d, Upsample
from networks.sparse.tensor import SparseTensor

__all__ = ["Downsample", "SparseTensor", "SubmanifoldConv3d", "Upsample"]
