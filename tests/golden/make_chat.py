"""Makes chat/: a small byte-level tokenizer, and conversations as transformers writes, encodes and masks them.

transformers 5.23.0, tokenizers 0.23.3, jinja2, Python 3.11; no torch.

    python tests/golden/make_chat.py

    tokenizer.json, tokenizer_config.json   byte-level BPE of 500 tokens trained on generated sentences, "\\n\\n" and
                "  " among them; <s>, </s> and the control tokens of tests/chat_templates.py
    turns.json  [{family, chat, turns}]: chats of TURNED in templates of TURNING; for every turn of the assistant [ids
                of the conversation before it with the generation prompt, ids up to it]
    cases.json  [{family, messages, text, ids, prompts, mask}]: text and ids of apply_chat_template; prompts: for every
                turn of the assistant the ids of the conversation before it with the generation prompt; mask: the
                assistant's tokens by return_assistant_tokens_mask, null for a template without generation blocks
"""

import copy
import datetime
import json
import shutil
import sys
from pathlib import Path

import jinja2
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

sys.path.insert(0, str(Path(__file__).parents[1]))
import chat_templates
from make_tokenizer import sentences

FOLDER = Path(__file__).parent / "chat"
# words with what stands before them, up to three digits, signs with line breaks after them, blanks up to a line break
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", *chat_templates.CONTROLS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [sentence + "\n\nassistant\n\n  user: Größe" for sentence in sentences()[:1000]]
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def conversations(system: bool) -> list[list[dict[str, str]]]:
    turns = chat_templates.TWO_TURNS
    found = [turns, turns[:2], [*turns[:3], {"role": "assistant", "content": "  blanks around \n"}]]
    return [*found, [chat_templates.SYSTEM, *turns]] if system else found


def turns(tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict], tools: list | None) -> list:
    """For a template that fails on arguments as objects they are JSON text."""

    def ids(some: list[dict], prompt: bool) -> list[int]:
        options = {"chat_template": template, "tools": tools, "add_generation_prompt": prompt, "return_dict": True}
        return tokenizer.apply_chat_template(some, **options)["input_ids"]

    for as_text in (False, True):
        some = copy.deepcopy(messages)
        for call in (call for message in some for call in message.get("tool_calls", [])):
            if as_text:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        try:
            return [
                [ids(some[:n], True), ids(some[: n + 1], False)]
                for n, message in enumerate(some)
                if message["role"] == "assistant"
            ]
        except (TypeError, jinja2.TemplateError):
            if as_text:
                raise
    raise AssertionError


class Day(datetime.datetime):
    """A fixed one for templates that write today's."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "Day":
        return cls(2024, 7, 26)


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(FOLDER)
    cases = []
    families = {name: (template, system) for name, (template, system, *_) in chat_templates.FAMILIES.items()}
    families["marked_whole"] = chat_templates.MARKED_WHOLE, True
    for family, (template, system) in families.items():
        for messages in conversations(system):
            marked = "generation %}" in template
            encoded = tokenizer.apply_chat_template(
                messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=marked
            )
            prompts = [
                tokenizer.apply_chat_template(
                    messages[:n], chat_template=template, add_generation_prompt=True, return_dict=True
                )["input_ids"]
                for n, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
            cases.append(
                {
                    "family": family,
                    "messages": messages,
                    "text": tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False),
                    "ids": encoded["input_ids"],
                    "prompts": prompts,
                    "mask": encoded["assistant_masks"] if marked else None,
                }
            )
    (FOLDER / "cases.json").write_text("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]\n")
    chat_template_utils.datetime = Day
    found = [
        {"family": family, "chat": chat, "turns": turns(tokenizer, template, messages, tools)}
        for family, (template, *_) in chat_templates.TURNING.items()
        for chat, (messages, tools) in chat_templates.TURNED.items()
    ]
    lines = (json.dumps(case, separators=(",", ":")) for case in found)
    (FOLDER / "turns.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    for file in FOLDER.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
