"""The judge's prompts by category of question, in FastChat's two files, which the paper's are as well.

    reviewers  JSONL {reviewer_id, prompt_id, metadata: {temperature, max_tokens}, category}: which prompt a category
               has; categories without a reviewer have that of "general"
    prompts    JSONL {prompt_id, system_prompt, prompt_template, defaults: {prompt}}: the template's fields are
               {question}, {answer_1}, {answer_2} and those of `defaults`

The prompts in this folder have the paper's roles (general, coding, math) in our own words; for the paper's, give
its files.
"""

import dataclasses
import string
from pathlib import Path
from typing import Any

from qlora_jax.data.read import read_rows
from qlora_jax.data.rows import Row
from qlora_jax.errors import InputError
from qlora_jax.settings import config_hash

HERE = Path(__file__).parent
REVIEWERS = HERE / "reviewer.jsonl"
PROMPTS = {"relative": HERE / "prompt_relative.jsonl", "threeclass": HERE / "prompt_threeclass.jsonl"}
GENERAL = "general"
FIELDS = ("question", "answer_1", "answer_2")


@dataclasses.dataclass(frozen=True)
class Prompt:
    system: str
    template: str
    defaults: dict[str, str]
    temperature: float
    max_tokens: int  # of the judge's text at most

    @property
    def tuple_wanted(self) -> bool:
        """Whether it asks for scores as a Python tuple, as the paper's prompt for math does."""
        return "tuple" in " ".join([self.template, *self.defaults.values()]).lower()

    @property
    def hash(self) -> str:
        """16 hex digits of the words alone."""
        words = {"system": self.system, "template": self.template, "defaults": self.defaults}
        return config_hash(words)[:16]

    def messages(self, question: str, answer_1: str, answer_2: str) -> list[dict[str, str]]:
        """The chat that a judge is sent."""
        fields = self.defaults | {"question": question, "answer_1": answer_1, "answer_2": answer_2}
        text = self.template.format(**fields)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": text}]


@dataclasses.dataclass(frozen=True)
class Prompts:
    by_category: dict[str, Prompt]  # GENERAL among them

    def of(self, category: str) -> Prompt:
        return self.by_category.get(category, self.by_category[GENERAL])


def read_prompts(
    prompts: Path, reviewers: Path, temperature: float | None = None, max_tokens: int | None = None
) -> Prompts:
    """The prompts of two files.

    Args:
      temperature, max_tokens: stand for what the reviewers' metadata says.
    Raises:
      InputError: a broken file, a field missing or of the wrong kind, a prompt that is not there, an unknown field in a
        template, or no reviewer for GENERAL.
    """
    rows = {row.fields.get("prompt_id"): row for row in read_rows(str(prompts))}
    by_category: dict[str, Prompt] = {}
    for reviewer in read_rows(str(reviewers)):
        category = _field(reviewer, "category", str)
        number = _field(reviewer, "prompt_id", int)
        settings = _field(reviewer, "metadata", dict)
        if number not in rows:
            raise InputError(f"{reviewer.where}: category {category} has prompt {number}, which {prompts} has not")
        if category in by_category:
            raise InputError(f"{reviewer.where}: a second reviewer for {category}; expected one for each category")
        by_category[category] = _prompt(
            rows[number],
            settings.get("temperature") if temperature is None else temperature,
            settings.get("max_tokens") if max_tokens is None else max_tokens,
            reviewer.where,
        )
    if GENERAL not in by_category:
        raise InputError(f"{reviewers}: no reviewer for {GENERAL}; found {', '.join(by_category)}")
    return Prompts(by_category)


def _prompt(row: Row, temperature: Any, max_tokens: Any, where: str) -> Prompt:
    template = _field(row, "prompt_template", str)
    defaults = _field(row, "defaults", dict)
    if not all(isinstance(text, str) for text in defaults.values()):
        raise InputError(f"{row.where}: defaults hold {defaults!r}; expected texts")
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise InputError(f"{where}: metadata.temperature is {temperature!r}; expected a number, or give --temperature")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise InputError(f"{where}: metadata.max_tokens is {max_tokens!r}; expected a positive int, or --max_tokens")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{row.where}: prompt_template: {error}; a brace that is meant is written twice") from error
    used = [name for _, name, _, _ in parts if name is not None]
    unknown = [name for name in used if name not in (*FIELDS, *defaults)]
    missing = [name for name in FIELDS if name not in used]
    if unknown or missing or any(spec or conversion for _, _, spec, conversion in parts):
        raise InputError(
            f"{row.where}: prompt_template has the fields {', '.join(used) or 'none'}; expected "
            f"{', '.join(FIELDS)} and those of defaults ({', '.join(defaults) or 'none'})"
        )
    return Prompt(_field(row, "system_prompt", str), template, defaults, float(temperature), max_tokens)


def _field(row: Row, name: str, kind: type) -> Any:
    value = row.fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(
            f"{row.where}: {name} is {value!r}; expected {'a number' if kind is int else f'a {kind.__name__}'}"
        )
    return value
