"""Measures of a model: perplexity of a text, exact match of answers, and comparisons of systems by judges."""
