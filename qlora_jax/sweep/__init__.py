"""Grids of configs.

grid → check → packs (cost) → engine (local, cluster: Ray; runner: packs/pack) → ledger → tabulate; search, compare,
view.
"""
