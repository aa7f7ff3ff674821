"""What a row says beside the columns that its format reads.

Most of it has no meaning for training (ids, sources, scores) and is passed over. Some names carry meaning wherever they
stand: an example without what they say is another example. Those a format reads, or refuses by name where they are not
empty; it never drops them. Names are those of OpenAI's, Axolotl's, LLaMA-Factory's, ms-swift's and TRL's data.
"""

from collections.abc import Collection
from typing import Any

from qlora_jax.data.fields import bad, is_empty, kind
from qlora_jax.data.rows import Row

SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
MARKS = ("weight", "train", "training", "loss")  # 0 or false: not to be learned; 1 or true: learned, as without them
GIVEN = ("instruction", "input", "context")  # what an answer is for

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PARTS = ("train_detail", "training_detail", "loss_scale", "loss_mask", "mask", "labels", "weights")
_ANSWERS = ("chosen", "rejected", "rejected_response", "kto_tag")
_CALLS = ("function_call", "tool_calls", "refusal", "reasoning_content", "thinking", "reasoning")

# name -> what it means, for errors
MEANING = (
    dict.fromkeys(SYSTEM, "a system message")
    | dict.fromkeys(TOOLS, "tools that the assistant may call")
    | dict.fromkeys(GIVEN, "what the answer is for")
    | dict.fromkeys(MARKS, "whether this is learned")
    | dict.fromkeys(_PARTS, "which parts are learned")
    | dict.fromkeys(_ANSWERS, "which answer is the better one")
    | dict.fromkeys(_CALLS, "a part of the answer")
    | dict.fromkeys(_MEDIA, "what no text model sees")
    | {"chat_template_kwargs": "settings of the chat template"}
    | {"history": "earlier turns", "label": "that this is no answer to learn"}
)
_EMPTY_JSON = ("[]", "{}", "null")


def refuse_unread(row: Row, reads: Collection[str], reader: str, mend: Collection[str] = (), how: str = "") -> None:
    """Raises InputError for a field that carries meaning, is not empty and is not in `reads`.

    Args:
      row: or a turn of one.
      reader: who does not read it, for the error.
      mend: fields that are read in another way, `how`.
    """
    for name in row.fields:
        if name not in MEANING or name in reads or _says_nothing(name, row.fields[name]):
            continue
        way = f"{how}, or take it out" if name in mend else "take it out"
        bad(
            row,
            name,
            f"the field {name} ({MEANING[name]}) holds {kind(row.fields[name])}, and {reader} has no place for it; "
            f"{way} where it does not matter",
        )


def _says_nothing(name: str, value: Any) -> bool:
    if is_empty(value) or (isinstance(value, str) and value.strip() in _EMPTY_JSON):
        return True
    if name == "label":  # a class of something, but for false: an answer that KTO pushes away
        return value is not False
    if name == "loss" and not isinstance(value, bool):  # a figure
        return True
    return name in (*MARKS, "kto_tag") and value == 1
