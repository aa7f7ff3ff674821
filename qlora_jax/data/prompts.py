"""The texts around an instruction: the prompts of the instruction sets and Guanaco's conversation.

A model answers well only to the very text it was trained on, so training, generation and evaluation all take their
prompts from here. Sources: the QLoRA paper's training code and its Guanaco release.
"""

from collections.abc import Mapping, Sequence

from qlora_jax.errors import InputError

_ALPACA_INTRO = "Below is an instruction that describes a task"
_ALPACA_REQUEST = "Write a response that appropriately completes the request."

GUANACO_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
GUANACO_LABELS = {"user": "### Human:", "assistant": "### Assistant:"}
HH_LABELS = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}  # of HH-RLHF's own conversations


def user_message(instruction: str, input: str = "") -> str:
    """An instruction and its input as a user would say them in a chat; a blank input is left out."""
    return f"{instruction}\n\n{input}" if input.strip() else instruction


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's prompt up to where the answer begins; `input` is left out, with its heading, when it is blank."""
    if input.strip():
        intro = f"{_ALPACA_INTRO}, paired with an input that provides further context. {_ALPACA_REQUEST}"
        return f"{intro}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
    return f"{_ALPACA_INTRO}. {_ALPACA_REQUEST}\n\n### Instruction:\n{instruction}\n\n### Response: "


def self_instruct_prompt(instruction: str, input: str = "") -> str:
    """Self-Instruct's prompt for a task, as its owners' user-oriented evaluation has it, and a space."""
    given = f"\n\nInput: {input.strip()}" if input.strip() else ""
    return f"{instruction.strip()}{given}\nOutput: "


def unnatural_prompt(instruction_with_input: str, constraints: str = "") -> str:
    """An instruction of Unnatural Instructions, its input within, and the constraints on the answer ("None." is none).

    The paper's code has no prompt for this set; its texts are joined by line breaks and nothing is added.
    """
    given = "" if constraints.strip().lower().rstrip(".") in ("", "none") else f"\n{constraints.strip()}"
    return f"{instruction_with_input.strip()}{given}\n"


def chain_of_thought_prompt(question: str) -> str:
    """FLAN v2's first template for chain of thought (the collection has several for every set)."""
    return f"{question} Let's think first. Chain of thought: "


def chain_of_thought_answer(rationale: str, answer: str) -> str:
    """The answer that goes with `chain_of_thought_prompt`."""
    return f"{rationale}\nTherefore, the answer is {answer}."


def guanaco_conversation(turns: Sequence[Mapping[str, str]]) -> str:
    """Turns {"role": "user" | "assistant", "content"} as Guanaco is trained on them: each begins a line with its label.

    Raises:
      InputError: a role is neither of the two.
    """
    for turn in turns:
        if turn["role"] not in GUANACO_LABELS:
            raise InputError(f"role {turn['role']!r} in a Guanaco conversation, expected user or assistant")
    return "\n".join(f"{GUANACO_LABELS[turn['role']]} {turn['content'].strip()}" for turn in turns)


def guanaco_prompt(turns: Sequence[Mapping[str, str]]) -> str:
    """The prompt for Guanaco's next answer: system line, the turns so far, and the assistant's label.

    The system line is GUANACO_SYSTEM unless the first turn has the role "system". The last turn is the user's.

    Raises:
      InputError: there is no turn, the last is not the user's, or a role is unknown.
    """
    system = GUANACO_SYSTEM
    if turns and turns[0]["role"] == "system":
        system, turns = turns[0]["content"].strip(), turns[1:]
    if not turns or turns[-1]["role"] != "user":
        raise InputError("a Guanaco prompt needs a conversation that ends with a user turn")
    return f"{system}\n{guanaco_conversation(turns)}\n{GUANACO_LABELS['assistant']}"
