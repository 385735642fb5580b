"""Sparse 3D tensors: coordinates, operations, layers."""
