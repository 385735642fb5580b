"""Triton kernels: what plain torch computes elsewhere, faster on CUDA. Reached by name, only where proven to work.

A module holds functions on tensors and the kernels that they start. Nothing is imported here: triton may be absent.
"""
