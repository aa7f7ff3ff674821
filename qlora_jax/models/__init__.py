"""The decoder.

kind (what one family does otherwise than another) and settings (keys of a config.json) → families/ (one reading of a
config.json each) → config (sizes and kind), known and sizes → block (a layer) and decoder on layers (Linear, norms),
rope, head and attention (whole or in chunks), mixtures/ (experts), chunks (a layer chunk by chunk); kept (what of a
layer its backward pass finds); divided/ (one device's part of a layer); vocabulary (rows of new tokens).
"""
