"""Judging of answers by a model behind an OpenAI-compatible endpoint.

What is asked: pairs (questions, answers, orders) and prompts (by category of question). How: client (one request
and its repetitions), run (many side by side), store (the file of verdicts), cost (before it starts). What comes
back: parse (a text to a score), summary (verdicts to a table).
"""
