"""Triton kernels of the loops in `tokprune.ops`: imported where a tensor lies on a CUDA device, never before."""
