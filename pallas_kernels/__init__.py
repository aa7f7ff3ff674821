"""Kernels: arrays in, arrays out. Nothing here knows of models, files or configs."""
