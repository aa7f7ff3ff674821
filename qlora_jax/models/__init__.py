"""Decoders: one file per architecture, one table per family from Hugging Face keys to ours."""
