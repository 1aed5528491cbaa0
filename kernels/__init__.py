"""Triton kernels, one file an operation. None is needed: without Triton the operations run through PyTorch."""
