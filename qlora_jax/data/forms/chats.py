"""Rows as conversations for a chat template: every format, each turn as the row has it and nothing around it.

A set of instructions gives a user's turn and an answer. Of a conversation the turns after the last answer that is
learned are left out; without one there is no chat. Tools' results are turns of their own, calls of tools belong to the
assistant's turn.
"""

from collections.abc import Callable

from qlora_jax.data.fields import Pair, bad, is_empty, items, kind
from qlora_jax.data.forms.conversations import hh_rlhf_turns, oasst1_turns
from qlora_jax.data.forms.instructions import alpaca as alpaca_pairs
from qlora_jax.data.forms.turns import Turn, chat_tools, chat_turns, is_learned, system_turn
from qlora_jax.data.rows import Row
from qlora_jax.text.chat import Chat


def from_pairs(read: Callable[[Row], list[Pair]]) -> Callable[[Row], list[Chat]]:
    """The reader of a set of instructions, as one that gives chats of a question and an answer, after the row's system
    message where it has one."""

    def chats(row: Row) -> list[Chat]:
        found = []
        for pair in read(row):
            question = pair.source if pair.message is None else pair.message
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": pair.target}]
            found.append(Chat([*system_turn(row), *turns], None, row.where))
        return found

    return chats


def from_turns(read: Callable[[Row], list[Turn]]) -> Callable[[Row], list[Chat]]:
    """The reader of a conversation's turns, as one that gives its chat."""
    return lambda row: chat_of(row, [dict(turn) for turn in read(row)])


oasst1 = from_turns(oasst1_turns)
hh_rlhf = from_turns(hh_rlhf_turns)


def alpaca(row: Row) -> list[Chat]:
    """{instruction, input?, output, system?, history?: [[question, answer]]}, as LLaMA-Factory has them: the history's
    answers are learned too."""
    before = [
        {"role": role, "content": content}
        for pair in _history(row)
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    found = []
    for chat in from_pairs(alpaca_pairs)(row):
        head = len(chat.messages) - 2
        found.append(Chat([*chat.messages[:head], *before, *chat.messages[head:]], chat.tools, chat.where))
    return found


def messages(row: Row) -> list[Chat]:
    """OpenAI's form: {messages: [{role, content, tool_calls?, weight?, ...}], tools?, system?} (forms/turns).

    Arguments of calls are objects in templates, so text that is JSON becomes one; so does a list of tools that is text.
    """
    return chat_of(row, chat_turns(row, "messages"))


def sharegpt(row: Row) -> list[Chat]:
    """ShareGPT's form: {conversations: [{from, value, train?, ...}], tools?, system?} (forms/turns)."""
    return chat_of(row, chat_turns(row, "conversations"))


def chat_of(row: Row, turns: list[Turn]) -> list[Chat]:
    """The chat of a row's turns up to the last answer that is learned, with the row's tools; none without one."""
    while turns and not (_answers(turns[-1]) and is_learned(turns[-1])):
        turns = turns[:-1]
    if not turns:
        return []
    learn = tuple(turn["role"] == "assistant" and is_learned(turn) for turn in turns)
    all_learned = all(learned or turn["role"] != "assistant" for turn, learned in zip(turns, learn, strict=True))
    said = [{name: value for name, value in turn.items() if name != "learn"} for turn in turns]
    return [Chat(said, chat_tools(row), row.where, None if all_learned else learn)]


def _answers(turn: Turn) -> bool:
    return turn["role"] == "assistant" and bool(turn["content"].strip() or turn.get("tool_calls"))


def _history(row: Row) -> list[list[str]]:
    if is_empty(row.fields.get("history")):
        return []
    pairs = items(row, "history")
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            bad(row, "history", f"expected lists of a question and an answer in the field history, found {kind(pair)}")
    return pairs
