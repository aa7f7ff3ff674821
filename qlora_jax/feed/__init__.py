"""From examples to batches.

load (all of it, from a config) → store and cache (an Arrow map under a content hash) → split → batches or packing →
pipeline (grain, read ahead); padding, describe and figures say what a config trains on.
"""
