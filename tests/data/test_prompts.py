"""The prompts, letter by letter: a model trained on one text answers badly to another."""

import pytest

from qlora_jax.data.prompts import GUANACO_SYSTEM, alpaca_prompt, guanaco_conversation, guanaco_prompt
from qlora_jax.errors import InputError


def test_alpaca_with_input():
    assert alpaca_prompt("Add {x}.", "1 {y}") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {x}.\n\n### Input:\n1 {y}\n\n### Response: "
    )


@pytest.mark.parametrize("blank", ["", " \n"])
def test_alpaca_without_input(blank):
    assert alpaca_prompt("Sing.", blank) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response: "
    )


TURNS = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?\nHow?"},
]


def test_guanaco():
    assert guanaco_conversation(TURNS) == "### Human: Hi\n### Assistant: Hello.\n### Human: Why?\nHow?"
    assert GUANACO_SYSTEM == (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert guanaco_prompt(TURNS[:1]) == f"{GUANACO_SYSTEM}\n### Human: Hi\n### Assistant:"
    system = {"role": "system", "content": "Be brief."}
    assert guanaco_prompt([system, *TURNS]) == f"Be brief.\n{guanaco_conversation(TURNS)}\n### Assistant:"


@pytest.mark.parametrize("turns", [[], TURNS[:2], [{"role": "system", "content": "Be brief."}]])
def test_a_prompt_ends_with_the_user(turns):
    with pytest.raises(InputError, match="ends with a user turn"):
        guanaco_prompt(turns)


def test_unknown_role():
    with pytest.raises(InputError, match="role 'tool'"):
        guanaco_conversation([{"role": "tool", "content": ""}])
