"""From a file's row to an example: tokens, and a mask of what is learned.

read (streamed; hub, json_text, rows) → formats (registry; forms/ on fields, prompts; detect finds one from the rows) →
examples or chat_examples; known (sets by name).
"""
