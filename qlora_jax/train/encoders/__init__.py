"""Runs of encoders: labels (what a config cannot ask of one, and its classes)."""
