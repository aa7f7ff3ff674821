"""The decoder.

config (sizes from config.json), known and sizes → llama (table of names, block, decoder) on layers (Linear,
RMSNorm, rotary) and attention (whole or in chunks), chunks (a layer chunk by chunk); kept (what of a layer
its backward pass finds); vocabulary (rows of new tokens).
"""
