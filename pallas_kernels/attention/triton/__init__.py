"""Triton kernels, through jax-triton: forward, and two for the gradient; launch gives them their grids and tiles."""
