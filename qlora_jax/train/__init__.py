"""Finetuning: loss, step, loop."""
