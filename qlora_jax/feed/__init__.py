"""From examples to batches.

load (all of it, from a config) → sources (the data sets that it names) → tokenized (each of them, by way of store and
cache: an Arrow map under a content hash) → split → batches or packing, in the order of orders → pipeline (grain, read
ahead); padding, describe and figures say what a config trains on.
"""
