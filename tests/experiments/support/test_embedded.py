"""The embedded material: made again it is the same, the splits share nothing, and pretraining states what they ask."""

import json
import math
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from configs import pretrain, pretrain_mini
from experiments.support.embedded import corpus, instructions, make, packing, tokenizer
from experiments.support.embedded.facts import RELATIONS, Fact, facts, fill
from qlora_jax.models.config import parse_config

ASSETS = pathlib.Path(__file__).resolve().parents[3] / "assets"


@pytest.fixture(scope="module")
def generated() -> list[str]:
    return corpus.documents(seed=0)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    names = ("train", "heldout")
    return {name: json.loads((ASSETS / "instructions" / f"{name}.json").read_text("utf-8")) for name in names}


@pytest.fixture(scope="module")
def committed_tokenizer():
    return tokenizer.load()


def test_generated_documents_are_fixed_by_the_seed(generated):
    assert corpus.documents(seed=0) == generated
    assert corpus.documents(seed=1, rounds=1) != corpus.documents(seed=0, rounds=1)
    assert 3_000_000 < sum(map(len, generated)) < 6_000_000


def test_committed_instruction_files_are_what_make_writes():
    for name, content in make.instruction_files().items():
        committed = (ASSETS / "instructions" / name).read_bytes()
        assert committed == content.encode(), f"{name} is old: run python -m experiments.embedded"


def test_rows_are_complete_and_distinct(rows):
    assert (len(rows["train"]), len(rows["heldout"])) == (1500, 200)
    prompts = [(row["instruction"], row["input"]) for split in rows.values() for row in split]
    assert len(set(prompts)) == len(prompts)
    for split in rows.values():
        for row in split:
            assert set(row) == {"instruction", "input", "output"}
            assert row["output"] == row["output"].strip() != ""
            assert len(row["output"].split()) <= 4
            assert not re.search(r"[{}_]", row["instruction"] + row["input"] + row["output"])


def _question_of() -> dict[tuple[str, str], Fact]:
    """(instruction, input) -> the fact it asks for, for every wording of every fact."""
    found: dict[tuple[str, str], Fact] = {}
    for fact in facts():
        with_input, alone = instructions.WORDINGS[fact.relation.name]
        found |= {(wording, fact.key): fact for wording in with_input}
        found |= {(fill(wording, fact), ""): fact for wording in alone}
    return found


def test_splits_share_no_item(rows):
    asked = _question_of()
    split = {name: [asked[row["instruction"], row["input"]] for row in rows[name]] for name in rows}
    for name in rows:
        assert [fact.answer for fact in split[name]] == [row["output"] for row in rows[name]]
    assert split["heldout"] == instructions.held_out_facts()
    train_items = set().union(*(instructions.items(fact) for fact in split["train"]))
    for fact in split["heldout"]:
        assert not instructions.items(fact) & train_items, fact


def test_items_join_what_asks_the_same_thing():
    by_name = {(fact.relation.name, fact.key): fact for fact in facts()}
    assert instructions.items(by_name["opposite", "hot"]) == instructions.items(by_name["opposite", "cold"])
    assert instructions.items(by_name["addition", "3 + 4"]) == instructions.items(by_name["addition", "4 + 3"])
    assert instructions.items(by_name["capital", "Kenya"]) == instructions.items(by_name["continent", "Kenya"])


def test_every_held_out_fact_is_stated_often_in_the_corpus(generated):
    """Counts plain statements and questions with their answers, whole and in the relation's own words."""
    parts = ["\n".join(generated[place::8]).lower() for place in range(8)]
    for fact in instructions.held_out_facts():
        statements, questions = (
            [fill(wording, fact).lower() for wording in set(wordings)]
            for wordings in (fact.relation.statements, fact.relation.questions)
        )
        stated = asked = 0
        for part in parts:  # until it is often enough
            stated += sum(map(part.count, statements))
            asked += sum(map(part.count, questions))
            if stated >= 10 and stated + asked >= 20:
                break
        assert stated >= 10, (fact.relation.name, fact.key, stated)
        assert stated + asked >= 20, (fact.relation.name, fact.key, stated, asked)


def test_corpus_never_has_the_instruction_form(generated, rows):
    text = "\n".join(generated + corpus.stdlib_documents(300_000))
    for part in ("### Instruction", "### Input", "### Response", "Below is an instruction"):
        assert part not in text
    generated_text = "\n".join(generated)
    for asked in {row["instruction"] for row in rows["train"] + rows["heldout"]}:
        assert asked not in generated_text


def test_every_relation_has_rows_in_both_splits():
    held_out = [fact.relation.name for fact in instructions.held_out_facts()]
    assert set(held_out) == {relation.name for relation in RELATIONS} == set(instructions.WORDINGS)
    for relation in RELATIONS:
        keys = [key for key, _ in relation.pairs]
        assert len(keys) == len(set(keys)), relation.name


def test_arithmetic_facts_are_true():
    for relation in RELATIONS:
        for key, answer in relation.pairs:
            if relation.name == "addition":
                first, second = key.split(" + ")
                assert int(answer) == int(first) + int(second)
            elif relation.name == "larger":
                assert int(answer) == max(map(int, key.split(" and ")))
            elif relation.name == "next_number":
                assert int(answer) == int(key) + 1
            elif relation.name == "first_letter":
                assert key.startswith(answer) and len(answer) == 1


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t\r019.,a")), max_size=60))
def test_tokenizer_gives_every_text_back(committed_tokenizer, text):
    assert committed_tokenizer.decode(committed_tokenizer.encode(text).ids) == text


def test_tokenizer_of_the_prompt(committed_tokenizer, rows):
    assert committed_tokenizer.get_vocab_size() == tokenizer.VOCAB_SIZE
    ids = [committed_tokenizer.token_to_id(token) for token in (tokenizer.PAD, tokenizer.BOS, tokenizer.EOS)]
    assert ids == [tokenizer.PAD_ID, tokenizer.BOS_ID, tokenizer.EOS_ID]
    encode = tokenizer.encoder(committed_tokenizer)
    after_space, after_line, alone = encode(["a fox", "a\nfox", "fox"])
    assert after_space[-len(alone) :] == after_line[-len(alone) :] == alone
    assert len(encode(["1234"])[0]) == 4
    for split in rows.values():
        prompts = [make.alpaca_prompt(row["instruction"], row["input"]) + row["output"] for row in split]
        assert max(map(len, encode(prompts))) < 100


def test_pack_loses_nothing_but_the_last_row():
    documents = ["one", "three", "fifteen letters", ""]
    packed = packing.pack(documents, lambda texts: [[ord(c) for c in text] for text in texts], 4, 1, 2, seed=3)
    assert packed.dtype == np.int32 and packed.shape == (7, 4)
    stream = "".join(map(chr, packed.ravel()))
    found = [part.removeprefix("\x01") for part in stream.split("\x02")]
    assert stream[0] == "\x01"
    assert set(found[:-1]) <= set(documents)
    assert any(document.startswith(found[-1]) for document in documents)
    again = packing.pack(documents, lambda texts: [[ord(c) for c in text] for text in texts], 4, 1, 2, seed=3)
    np.testing.assert_array_equal(packed, again)


def test_pretraining_and_held_out_rows_are_parts_of_one_stream(monkeypatch, generated):
    monkeypatch.setattr(corpus, "documents", lambda seed: generated[:2000])
    monkeypatch.setattr(corpus, "stdlib_documents", lambda seed: ["Some prose.\n"] * 100)
    packing._all_rows.cache_clear()
    train, held_out = packing.pretraining_rows(), packing.heldout_rows()
    packing._all_rows.cache_clear()
    assert train.dtype == held_out.dtype == np.int32
    assert train.shape[1] == held_out.shape[1] == 256
    assert 0.01 < len(held_out) / len(train) < 0.03
    assert max(train.max(), held_out.max()) < tokenizer.VOCAB_SIZE
    assert min(train.min(), held_out.min()) > tokenizer.PAD_ID
    known = set(map(bytes, train))
    assert not any(bytes(row) in known for row in held_out)


@pytest.mark.parametrize(("folder", "config"), [("tiny_llama", pretrain), ("mini_llama", pretrain_mini)])
def test_committed_models_are_what_their_configs_describe(folder, config):
    measured = json.loads((ASSETS / folder / "pretraining.json").read_text("utf-8"))
    recipe = config.get_config()
    assert measured["recipe"] == recipe.to_dict()
    sizes = parse_config(json.loads((ASSETS / folder / "config.json").read_text("utf-8")), folder)
    assert {name: getattr(sizes, name) for name in "DFLNKH"} == {name: recipe[name] for name in "DFLNKH"}
    with safe_open(ASSETS / folder / "model.safetensors", "numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)
    assert sum(map(math.prod, shapes)) == measured["parameters"]
    assert f"{measured['parameters']:,} parameters" in config.__doc__ or folder == "tiny_llama"


def test_standard_library_text_is_prose_in_bounds():
    texts = corpus.stdlib_documents(limit_bytes=200_000)
    assert 100_000 < sum(len(text.encode()) for text in texts) <= 200_000
    assert "keywords of Python" in texts[0]
    assert any("Beautiful is better than ugly." in text for text in texts)
