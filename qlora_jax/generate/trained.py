"""How an adapter is asked: the template of its training, kept beside it, so that nobody has to remember it."""

from pathlib import Path
from typing import Any

from qlora_jax.data.chat_examples import uses_chat_template
from qlora_jax.data.detect import AUTO, find_format
from qlora_jax.files import write_json
from qlora_jax.generate.prompting import TEMPLATES
from qlora_jax.io.peft import PROMPTS
from qlora_jax.models.config import read_json
from qlora_jax.text.tokenizer import Tokenizer

# The template of `prompting` that asks as the paper's form of a format does; the others' prompts are texts as they are.
_OF_FORMAT = {
    "alpaca": "alpaca",
    "dolly": "alpaca",
    "oasst1": "guanaco",
    "messages": "guanaco",
    "sharegpt": "guanaco",
}


def template_of(data: Any, tokenizer: Tokenizer) -> str:
    """The template of prompting.TEMPLATES that asks as a config's `data` section trains."""
    if data.batches or not data.path:
        return "plain"
    format = find_format(data.path, data.revision) if data.format == AUTO else data.format
    if uses_chat_template(data.template, format, tokenizer):
        return "chat"
    return _OF_FORMAT.get(format, "plain")


def write_template(folder: Path, template: str) -> None:
    """Into an adapter's folder."""
    write_json(folder / PROMPTS, {"template": template})


def read_template(folder: Path) -> str | None:
    """The template that an adapter's folder names; None where it names none that is known here."""
    if not (folder / PROMPTS).is_file():
        return None
    template = read_json(folder / PROMPTS).get("template")
    return template if template in TEMPLATES else None
