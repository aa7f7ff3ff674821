"""Mosaic GPU kernels, for Hopper.

hopper (forward and backward, any rows) with fragments (what its registers stand for) and fragments_ptx (decoding into
them); few_rows (forward, up to 16 rows) with few_rows_ptx (all of its work); decode (looking codes up) serves both.
"""
