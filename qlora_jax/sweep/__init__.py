"""Grids of configs.

grid → check → inputs → packs (cost) → engine (local, cluster: Ray; runner: packs/pack) → ledger → tabulate; search,
compare, view.
"""
