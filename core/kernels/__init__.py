"""Kernels for GPUs, in Triton, one a file: maths and shapes on top, the kernel, a wrapper that checks its arguments.

Nothing here is imported unless a GPU backend is chosen, so the core runs without Triton.
"""
