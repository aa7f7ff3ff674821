"""Makes tokenizer/: a tiny Llama-like SentencePiece model, the same as tokenizer.json, and texts with their token ids.

sentencepiece 0.2.3, transformers 5.23.0, tokenizers 0.23.3, protobuf 7.36.2, Python 3.11.

    python tests/golden/make_tokenizer.py

    tokenizer.model         SentencePiece BPE trained on generated sentences as Llama's was: 400 pieces, byte fallback,
                            split digits, identity normalization, extra spaces kept; <unk> 0, <s> 1, </s> 2, no padding
    tokenizer.json          the same converted by transformers, with its tokenizer_config.json; the leading space is
                            added by a Metaspace pre-tokenizer, and not when the text begins with a space
    legacy_tokenizer.json   the same with the normalizer of Llama 2's own tokenizer.json, which always adds the space
    cases.json              [{text, ids, hf_ids, legacy_ids, decoded}]: ids from sentencepiece, no BOS or EOS, the text
                            being plain text throughout ("<s>" is three characters, not BOS); hf_ids from tokenizer.json
                            and legacy_ids from legacy_tokenizer.json, no special tokens added, but there "<s>" in the
                            text does become BOS; decoded: sentencepiece's text of ids
"""

import io
import json
import random
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, normalizers
from transformers import LlamaTokenizer

FOLDER = Path(__file__).parent / "tokenizer"
SUBJECTS = ["The cat", "A small dog", "My friend", "The old teacher", "One bird", "Lily", "The assistant", "A human"]
VERBS = ["reads", "writes", "finds", "answers", "counts", "explains", "sees", "describes"]
OBJECTS = ["a question", "the instruction", "12 red apples", "a story", "the response", "an input", "347 words", "it"]
ENDINGS = [".", "!", "?", ", and then stops.", " in the garden.", " because it is late.", ":\n### Response:"]
TEXTS = [
    "",
    " ",
    "  ",
    "   ",
    "a",
    " a",
    "  a",
    "a ",
    "a  ",
    "The cat reads a story.",
    " The cat reads a story.",
    "The  cat   reads    a story.  ",
    "The cat\nreads\n\na story.\n",
    "\n",
    "\n\n\n",
    " \n ",
    "\t",
    "\ta\tb",
    "\r\n",
    "### Instruction:\nCount 12 apples.\n\n### Response: ",
    "### Human: Why?\n### Assistant: It is late.",
    "2023 347 1000000",
    "3.14159",
    "<s>",
    "</s>",
    "<s>The cat</s>",
    "the end</s>",
    "<unk>",
    "<0x0A>",
    "[INST] <<SYS>>\n",
    "\u2581",
    "\u2581a\u2581",
    "a\u00a0b",
    "\u3000",
    "\u00e9t\u00e9",
    "e\u0301te\u0301",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f600",
    "The cat \U0001f408\u200d\u2b1b reads \U0001f4d6.",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ufb01nd \u2460 \uff21",
    "\x00\x01\x7f",
    "def f(x):\n    return x + 1\n",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "https://example.com/a?b=c&d=e",
    "QLORA",
    "thethethe the thethe",
]


def sentences() -> list[str]:
    """Generated training text."""
    rng = random.Random(5)
    parts = (SUBJECTS, VERBS, OBJECTS)
    return [" ".join(rng.choice(part) for part in parts) + rng.choice(ENDINGS) for _ in range(4000)]


def legacy(tokenizer_json: str) -> Tokenizer:
    """tokenizer.json's text -> the same tokenizer with the leading space prepended by the normalizer."""
    spec = json.loads(tokenizer_json)
    spec["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (FOLDER / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    old_style = legacy((FOLDER / "tokenizer.json").read_text())
    old_style.save(str(FOLDER / "legacy_tokenizer.json"))
    cases = []
    for text in TEXTS:
        ids = processor.encode(text)
        hf_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        legacy_ids = old_style.encode(text, add_special_tokens=False).ids
        decoded = processor.decode(ids)
        cases.append({"text": text, "ids": ids, "hf_ids": hf_ids, "legacy_ids": legacy_ids, "decoded": decoded})
        for name, other in (("tokenizer.json", hf_ids), ("legacy_tokenizer.json", legacy_ids)):
            if ids != other:
                print(f"{name} differs on {text!r}: {ids} {other}")
    (FOLDER / "cases.json").write_text(json.dumps(cases, indent=0) + "\n")
    for file in FOLDER.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
