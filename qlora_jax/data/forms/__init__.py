"""The forms that rows come in: a row's fields to what is given and what is learned.

columns (what is refused where nobody reads it) → turns → conversations, instructions (the paper's form) → chats (for a
chat template). Nothing here knows a format's name: data/formats registers them.
"""
