"""Packs: many adapters trained in one program over one frozen base.

pack (many configs → results) → members (planned alone) → warm (bases, data and programs that are kept) → run →
step, files.
"""
