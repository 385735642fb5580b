"""Sparse networks on CT tokens."""
