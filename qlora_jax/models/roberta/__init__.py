"""Encoders that classify rows: RoBERTa.

names (of what no decoder has) → row (a batch's row taken apart: tokens, label) → head (classes, or a number, of the
first token) → encoder (the whole).
"""
