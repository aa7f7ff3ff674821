"""T5's tokenizers: both files give transformers' ids, and its prompts end as its answers do."""

import json
import shutil

import pytest

from qlora_jax.data.examples import Lengths, tokenize_examples
from qlora_jax.data.formats import Text
from qlora_jax.text.tokenizer import Tokenizer
from tests.t5 import FOLDERS

FOLDER = FOLDERS / "tokenizer"


@pytest.fixture(params=["tokenizer.json", "spiece.model"])
def tokenizer(request, tmp_path):
    for name in (request.param, "tokenizer_config.json"):
        shutil.copyfile(FOLDER / name, tmp_path / name)
    shutil.copyfile(FOLDERS / "v11" / "config.json", tmp_path / "config.json")
    return Tokenizer.from_folder(tmp_path)


def test_ids_are_those_of_transformers(tokenizer):
    assert tokenizer.ends_source and tokenizer.bos_id is None and tokenizer.eos_ids == (1,)
    for case in json.loads((FOLDER / "cases.json").read_text()):
        assert tokenizer.encode_source(case["text"]) == case["ids"]
        if 2 not in case["ids"]:  # the unknown, for which sentencepiece writes a sign of its own
            assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_examples(tokenizer):
    """EOS stands behind both, and stays where the prompt is cut."""
    texts = [Text("The cat reads", "a story.", "here"), Text("", "it", "there")]
    whole, cut = tokenize_examples(texts, tokenizer, Lengths(20, 20))
    source, target = (tokenizer.encode(text) for text in ("The cat reads", "a story."))
    assert whole[0].tokens.tolist() == [*source, 1, *target, 1]
    assert whole[0].loss_mask.tolist() == [False] * (len(source) + 1) + [True] * (len(target) + 1)
    assert whole[1].tokens.tolist() == [1, *tokenizer.encode("it"), 1] and not whole[1].loss_mask[0]
    assert (cut.sources, cut.targets) == (0, 0)
    short, cut = tokenize_examples(texts[:1], tokenizer, Lengths(4, 3))
    assert short[0].tokens.tolist() == [*source[:3], 1, *target[:3]]
    assert (cut.sources, cut.targets) == (1, 1)


def test_the_cache_keeps_them_apart(tmp_path):
    """Examples of the same tokenizer files are others where the model is a decoder."""
    pair, alone = tmp_path / "pair", tmp_path / "alone"
    for folder, architecture in ((pair, "T5ForConditionalGeneration"), (alone, "LlamaForCausalLM")):
        shutil.copytree(FOLDER, folder)
        (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    found = [Tokenizer.from_folder(folder) for folder in (pair, alone)]
    assert [tokenizer.ends_source for tokenizer in found] == [True, False]
    assert found[0].content() != found[1].content()
    assert Tokenizer.from_folder(alone, pair).ends_source  # an adapter's folder beside its base
