"""Triton kernels for GPUs. ``ops/triton.py`` launches them.

Each file has one task: ``arithmetic`` (exact numbers), ``decode`` (MXFP4 bytes -> numbers, for each
layout), ``matmul`` (the grouped matmul), ``epilogue`` (bias, SwiGLU, gammas and the sum over a
token's rows), ``routing``.
"""
