"""From a file's row to an example: tokens, and a mask of what is learned.

read (streamed; hub, json_text, rows) → formats (registry; instructions, conversations and chats on turns, fields,
columns, prompts) → examples or chat_examples; known (sets by name).
"""
