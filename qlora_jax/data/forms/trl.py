"""Rows as TRL takes them: {prompt, completion}, {prompt?, chosen, rejected} and {text}.

A prompt, completion, chosen or rejected is text, or a list of messages (forms/turns) where the row is conversational.
What is given is the prompt; of the turns after it the assistant's are learned. A row of preferences teaches its chosen
answer, as if there were no other.
"""

import itertools
from collections.abc import Callable

from qlora_jax.data.fields import Pair, answered, bad, is_empty, text
from qlora_jax.data.forms.chats import chat_of
from qlora_jax.data.forms.conversations import guanaco, one_system
from qlora_jax.data.forms.turns import Turn, chat_turns, plain_turns, system_turn
from qlora_jax.data.prompts import HH_LABELS
from qlora_jax.data.rows import Row
from qlora_jax.text.chat import Chat

_END = "<|endoftext|>"  # of GPT-3, at the end of completions; our examples end with the tokenizer's own EOS


def is_conversational(row: Row) -> bool:
    """Whether a row has messages where others have text."""
    return any(isinstance(value := row.fields.get(name), list) and value for name in ("prompt", "completion", "chosen"))


def prompt_completion(row: Row) -> list[Pair]:
    """{prompt, completion}: text as it is, a closing <|endoftext|> left out; messages in Guanaco's conversation form,
    of which the completion alone is learned."""
    if is_conversational(row):
        return guanaco(one_system(row, "prompt", _prompted(row, "completion", plain_turns)))
    return answered(text(row, "prompt", blank=True), text(row, "completion", blank=True).removesuffix(_END))


def prompt_completion_chats(row: Row) -> list[Chat]:
    """The same for a chat template; a prompt that is text is the user's turn."""
    return chat_of(row, _prompted(row, "completion", chat_turns))


def preference(row: Row) -> list[Pair]:
    """{prompt?, chosen, rejected}: the prompt and `chosen`, in the forms of `prompt_completion`. Without a prompt it is
    what both conversations begin with."""
    if is_conversational(row):
        return guanaco(one_system(row, "chosen", _preferred(row, plain_turns)))
    _check_text(row)
    return answered(text(row, "prompt", blank=True), text(row, "chosen", blank=True))


def preference_chats(row: Row) -> list[Chat]:
    """The same for a chat template."""
    if not is_conversational(row):
        _check_text(row)
    return chat_of(row, _preferred(row, chat_turns))


def plain_text(row: Row) -> list[Pair]:
    """{text}: all of it is learned."""
    return answered("", text(row, "text", blank=True))


def plain_text_chats(row: Row) -> list[Chat]:
    """Raises InputError: plain text has no turns."""
    bad(row, "text", "data.format=text is plain text, which no chat template is for: set data.template=paper")


def _check_text(row: Row) -> None:
    chosen = text(row, "chosen", blank=True)
    if chosen.startswith(HH_LABELS["user"]):
        bad(row, "chosen", "the field chosen is a conversation in HH-RLHF's form, which data.format=hh-rlhf reads")
    if is_empty(row.fields.get("prompt")):
        bad(
            row,
            "prompt",
            "the field chosen is text and there is no prompt: what it answers is not known; add a field prompt, or "
            "give chosen and rejected as lists of messages",
        )


def _prompted(row: Row, answer: str, read: Callable[..., list[Turn]]) -> list[Turn]:
    """The turns of the prompt, none of them to be learned, and those of the answer."""
    given = _prompt(row, read)
    if isinstance(row.fields.get(answer), str):
        said: list[Turn] = [{"role": "assistant", "content": text(row, answer, blank=True).removesuffix(_END)}]
    else:
        said = read(row, answer, with_system=False)
    if said and said[0]["role"] == "system":
        bad(row, answer, f"the field {answer} begins with a system turn; put it at the head of the prompt")
    return [*_unlearned(given), *said]


def _prompt(row: Row, read: Callable[..., list[Turn]]) -> list[Turn]:
    if isinstance(row.fields.get("prompt"), list):
        return read(row, "prompt")
    return [*system_turn(row), {"role": "user", "content": text(row, "prompt")}]


def _preferred(row: Row, read: Callable[..., list[Turn]]) -> list[Turn]:
    """The chosen conversation, of which the prompt is not learned: the field, or what `rejected` begins with too."""
    if isinstance(row.fields.get("chosen"), str):
        return _prompted(row, "chosen", read)
    chosen = read(row, "chosen", with_system=False)
    if not is_empty(row.fields.get("prompt")):
        given = _prompt(row, read)
        if chosen and chosen[0]["role"] in ("assistant", "tool"):
            return [*_unlearned(given), *chosen]
        asked = [turn for turn in given if turn["role"] != "system" or chosen[:1] == [turn]]
        begins = next((n for n in (0, 1) if chosen[n : n + len(asked)] == asked), None)
        if begins is None:
            bad(row, "chosen", "chosen begins with other turns than the prompt; leave out the prompt, or these turns")
        begins += len(asked)
        given = given[:1] if given[0]["role"] == "system" and chosen[0]["role"] != "system" else []
        return [*_unlearned(given), *_unlearned(chosen[:begins]), *chosen[begins:]]
    shared = 0
    if not is_empty(row.fields.get("rejected")):
        pairs = zip(chosen, read(row, "rejected", with_system=False), strict=False)
        shared = len(list(itertools.takewhile(lambda both: both[0] == both[1], pairs)))
    shared = min(shared, max(len(chosen) - 1, 0))
    given = [] if chosen and chosen[0]["role"] == "system" else system_turn(row)
    return [*given, *_unlearned(chosen[:shared]), *chosen[shared:]]


def _unlearned(turns: list[Turn]) -> list[Turn]:
    return [turn | {"learn": False} for turn in turns]
