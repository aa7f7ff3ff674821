"""Text and ids: tokenizers, chat templates, what of a chat is learned.

tokenizer (files → backends, decode_stream) → chat_template (rendering) with chat_guard (letters stay letters) →
chat_spans (what the assistant says) → chat_tokens (the same in tokens); chat_prompt for generating; added_tokens;
chat (the record).
"""
