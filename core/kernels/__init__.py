"""Kernels of the attention core for GPUs, one a file. None is here yet: attention runs on torch's own operators."""
