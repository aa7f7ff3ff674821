"""Readers of tokenizers' files and chat templates: see readers.py."""

import base64
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import chat_templates

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
_DAY = datetime.date(2024, 1, 2)
_TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4 </s> <|turn|>", "thinking": "easy"},
    {"role": "user", "content": "Größe 😀?"},
]


def _small_json() -> dict[str, Any]:
    """A tokenizer.json of all bytes and a few joined ones."""
    from qlora_jax.text.ranked import _spec

    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b" a", b"abc"]
    specials = {"<s>": 259, "</s>": 260, "<|turn|>": 261}
    return _spec({token: number for number, token in enumerate(tokens)}, r"\s+|\S+", specials, "")


def tokenizer(beside: Callable[[], dict[str, bytes]]) -> Callable[[Path], Callable[[bytes], Any]]:
    def make(folder: Path) -> Callable[[bytes], Any]:
        from qlora_jax.text.tokenizer import Tokenizer

        for other, content in beside().items():
            (folder / other).write_bytes(content)

        def read(data: bytes) -> None:
            tokenizer = Tokenizer.from_folder(folder)
            tokenizer.content()
            ids = tokenizer.encode("abc é 😀</s>", bos=True, eos=True)
            tokenizer.decode([*ids, *tokenizer.eos_ids, 2**31 - 1])
            tokenizer.encode_from_start("ab")
            if tokenizer.chat_template is not None:
                messages, _ = tokenizer.guard_chat(_TALK)
                text, _, named = tokenizer.unguard(tokenizer.render_chat(messages, True, now=_DAY).text)
                tokenizer.encode_unguarded([(text, named)])

        return read

    return make


SETTINGS = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False},
    "add_bos_token": True, "model_max_length": 10**30, "auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]},
    "added_tokens_decoder": {"260": {"content": "</s>", "special": True}},
    "chat_template": "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
}  # fmt: skip


def beside() -> dict[str, bytes]:
    return {
        "tokenizer.json": json.dumps(_small_json()).encode(),
        "tokenizer_config.json": json.dumps(SETTINGS).encode(),
    }


def beside_pieces() -> dict[str, bytes]:
    names = ("tokenizer_config.json", "tokenizer.model")
    return {name: (GOLDEN / "tokenizer" / name).read_bytes() for name in names}


def specs() -> list[bytes]:
    spec = _small_json()
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [259], "tokens": ["<s>"]}},
    }  # fmt: skip
    unigram = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0], ["ab", -1.5]],
        "byte_fallback": False,
    }
    words = {"type": "WordPiece", "unk_token": "[U]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9,
             "vocab": {"[U]": 0, "ab": 1, "##c": 2}}  # fmt: skip
    clean = {
        "type": "Sequence",
        "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " +"}, "content": "_"}],
    }
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
    other = {"added_tokens": [spec["added_tokens"][1] | {"id": 4}], "post_processor": None}
    pieces = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    made = [
        spec, spec | {"post_processor": template},
        spec | other | {"model": unigram, "normalizer": clean, "pre_tokenizer": metaspace, "decoder": metaspace},
        spec | other | {"model": words, "pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": pieces},
    ]  # fmt: skip
    return [json.dumps(each).encode() for each in made]


def tekkens() -> list[bytes]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc"]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(tokens)
    ]
    config = {
        "pattern": r"[^\s\w]|\s+|\w+",
        "default_vocab_size": len(tokens) + 20,
        "default_num_special_tokens": 20,
        "version": "v3",
    }
    return [json.dumps({"config": config, "vocab": vocab}).encode()]


def ranks() -> list[bytes]:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc"]
    return [b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))]


def of_ranks() -> dict[str, bytes]:
    added = {"258": {"content": "<s>", "special": True}, "259": {"content": "</s>", "special": True}}
    return {"tokenizer_config.json": json.dumps(SETTINGS | {"added_tokens_decoder": added}).encode()}


def pieces() -> list[bytes]:
    return [(GOLDEN / "tokenizer" / "tokenizer.model").read_bytes()]


def template(folder: Path) -> Callable[[bytes], Any]:
    from qlora_jax.text import chat_template

    def read(data: bytes) -> None:
        try:
            template = data.decode()
        except UnicodeDecodeError:
            return
        if len(data) % 4 == 0:
            chat_template.searched(template)
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        chat_template.render(template, _TALK, True, names, str(folder), [{"type": "function"}], _DAY)

    return read


def templates() -> list[bytes]:
    return [text.encode() for text in vars(chat_templates).values() if isinstance(text, str) and "{%" in text]
