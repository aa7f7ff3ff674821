"""Sweeps: a grid of configs, packs of its points, what runs them, and the ledger of what came out."""
