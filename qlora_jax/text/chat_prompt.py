"""A conversation to generate from, as ids."""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.text.chat_spans import prompt_spans
from qlora_jax.text.chat_tokens import encode_prompt
from qlora_jax.text.tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation: the template's control tokens are ids, the same letters in a message are letters.

    What stands before a turn of the assistant is encoded as training does (chat_tokens): as it was when it was
    generated. Raises InputError when the tokenizer has no chat template or it refuses the conversation.
    """
    return encode_prompt(prompt_spans(messages, add_generation_prompt, tokenizer), tokenizer)
