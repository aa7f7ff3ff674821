"""Triton kernels, for NVIDIA GPUs from Ampere on."""
