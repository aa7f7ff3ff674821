"""Triton kernels, for NVIDIA GPUs from Ampere on.

few_rows launches forward (up to 16 rows of x), scratch launches dequantize. decode is what the two kernels share, and
launch what the two launchers need.
"""
