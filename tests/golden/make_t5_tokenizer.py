"""Makes t5/tokenizer/: a tiny SentencePiece Unigram model as T5's are, the same as tokenizer.json, and ids of texts.

sentencepiece 0.2.3, transformers 5.23.0, tokenizers 0.23.3, protobuf 7.36.2, Python 3.11.

    python tests/golden/make_t5_tokenizer.py

    spiece.model      Unigram, 80 pieces of generated sentences: <pad> 0, </s> 1, <unk> 2, no begin token; line ends
                      and tabs become blanks, a ligature its letters
    tokenizer.json    the same converted by transformers, with 4 tokens <extra_id_N> and its tokenizer_config.json
    cases.json        [{text, ids, decoded}]: T5Tokenizer's ids, which end with </s>, and its text of them
"""

import io
import json
import shutil
from pathlib import Path

import sentencepiece
from make_tokenizer import sentences
from transformers import T5Tokenizer

FOLDER = Path(__file__).parent / "t5" / "tokenizer"
TEXTS = [
    "The cat reads a story.", "a", "  two   spaces ", "Definition: count 12 apples.\n\nInput: it is late", "naïve ﬁnd",
    "Now complete the following example - Input: A human explains. Output: ", "你好", "the response, 347 words",
]  # fmt: skip


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    rules = FOLDER / "rules.tsv"
    rules.write_text("A\t20\n9\t20\nFB01\t66 69\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences()), model_writer=model, model_type="unigram", vocab_size=80, num_threads=1,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, normalization_rule_tsv=str(rules),
    )  # fmt: skip
    rules.unlink()
    (FOLDER / "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(FOLDER, extra_ids=4)
    tokenizer.save_pretrained(FOLDER)
    cases = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    (FOLDER / "cases.json").write_text(json.dumps(cases, indent=0) + "\n")
    for file in FOLDER.iterdir():
        file.chmod(0o644)
    print(len(tokenizer), cases[0])


if __name__ == "__main__":
    main()
