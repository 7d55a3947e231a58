"""Attention kernels for GPUs, in Triton."""
