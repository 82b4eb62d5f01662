"""Kernels in Triton: what runs on a GPU. ``ops/triton.py`` launches them.

One file a concern: ``arithmetic`` (exact numbers), ``decode`` (MXFP4 bytes -> numbers, for each
layout), ``matmul`` (the grouped matmul and the sum over a token's rows), ``routing``.
"""
