"""Text from a model.

prompting (ids and text, stops), requests (files of prompts) → decode (KV cache, batches), sampling, seeds (what
draws depend on) → answers and answer_file (JSONL that resumes), chat, transcript.
"""
