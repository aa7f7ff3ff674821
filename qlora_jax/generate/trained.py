"""How an adapter is asked: the template of its training, kept beside it, so that nobody has to remember it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.files import write_json
from qlora_jax.generate.prompting import TEMPLATES
from qlora_jax.io.peft import PROMPTS
from qlora_jax.models.config import read_json

# The template of `prompting` that asks as the paper's form of a format does; the others' prompts are texts as they are.
_OF_FORMAT = {
    "alpaca": "alpaca",
    "dolly": "alpaca",
    "oasst1": "guanaco",
    "messages": "guanaco",
    "sharegpt": "guanaco",
}


def template_of(sources: Sequence[Mapping[str, Any]]) -> str:
    """The template of prompting.TEMPLATES that asks as a run trained on its data sets (feed/load.LoadedData.sources);
    of several the first one's."""
    if not sources:
        return "plain"
    first = sources[0]
    return "chat" if first["chat"] else _OF_FORMAT.get(first["format"], "plain")


def write_template(folder: Path, template: str) -> None:
    """Into an adapter's folder."""
    write_json(folder / PROMPTS, {"template": template})


def read_template(folder: Path) -> str | None:
    """The template that an adapter's folder names; None where it names none that is known here."""
    if not (folder / PROMPTS).is_file():
        return None
    template = read_json(folder / PROMPTS).get("template")
    return template if template in TEMPLATES else None
