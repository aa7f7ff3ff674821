"""Text and ids: tokenizers, chat templates, what of a chat is learned.

tokenizer (files → backends, decode_stream) → chat_template (rendering, in chat_sandbox) with chat_guard (letters stay
letters) → chat_turns (a turn's prompt and answer) → chat_rows (texts in which they stand) → chat_tokens (the same in
tokens); chat_prompt for generating; added_tokens; chat (the record).
"""
