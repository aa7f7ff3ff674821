"""A conversation to generate from, as ids, and what a model answered, as a message of the conversation."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.errors import InputError
from qlora_jax.text.chat_rows import prompt_row
from qlora_jax.text.chat_tokens import encode_prompt
from qlora_jax.text.chat_turns import Turns
from qlora_jax.text.tokenizer import Tokenizer

_THOUGHT, _ANSWER = "Zq7pT", "Zq7pA"  # stand for reasoning and answer, to see how a template writes them


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
) -> list[int]:
    """Ids of a conversation: the template's control tokens are ids, the same letters in a message are letters.

    What stands before a turn of the assistant is encoded as training does (chat_tokens): as it was when it was
    generated. Raises InputError when the tokenizer has no chat template or it refuses the conversation.
    """
    return encode_prompt(prompt_row(messages, add_generation_prompt, tokenizer, tools), tokenizer)


def answered(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], prompt: Sequence[int], ids: Sequence[int]
) -> dict[str, str]:
    """The message {"role": "assistant", "content", "reasoning_content"?} that a model's answer is.

    Args:
      messages: what the model answers; prompt: their ids; ids: the answer's, without the end token.

    The template's own form of an answer is taken off. What is not in that form, as an answer that was cut short, is
    content as it stands, after the sign that opens its thinking where the prompt has that.
    """
    stream = tokenizer.stream(prompt, tokenizer.controls)
    said = stream.push(ids) + stream.flush()
    turns = Turns(messages, None, tokenizer)
    for answer in ({"content": _ANSWER, "reasoning_content": _THOUGHT}, {"content": _ANSWER}):
        before, *others, after = _form(tokenizer, messages, answer) or ("\ufdd0", "")
        rest = said.removeprefix(before).removesuffix(after)
        if not said.startswith(before) or any(other not in rest for other in others):
            continue
        thought, _, content = rest.partition(others[0]) if others else ("", "", rest)
        reasoning = {"reasoning_content": thought} if thought.strip() else {}
        return {"role": "assistant", "content": content, **reasoning}
    return {"role": "assistant", "content": turns.opening(len(messages)) + said}


def _form(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], answer: Mapping[str, str]) -> list[str] | None:
    """What the template writes around the texts of an answer, up to its end token; None where one is missing."""
    turns = Turns([*messages, {"role": "assistant", **answer}], None, tokenizer)
    try:
        turn, whole = turns.turn(len(messages)), turns.whole()
    except InputError:
        return None
    if any(text not in whole for text in answer.values()):
        return None
    said = turn.text[turn.begin : turn.end]
    said = said.removesuffix(next((token for token in tokenizer.ends if said.endswith(token)), ""))
    pieces = re.split("|".join(sorted(answer.values())), said)
    return pieces if len(pieces) == len(answer) + 1 else None
