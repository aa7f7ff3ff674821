"""The whole way from the config's data section to batches, on files made here and on real ones."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from qlora_jax.errors import InputError
from qlora_jax.feed.batches import Batches, FileBatches, eval_batches
from qlora_jax.feed.load import load_data, longest_example
from qlora_jax.text.tokenizer import Tokenizer
from tests.chat_templates import CHATML, RECENT, TWO_TURNS
from tests.data.test_chat_examples import with_template


def config(**changes):
    section = ConfigDict(
        {
            "path": "",
            "revision": "main",
            "format": "input-output",
            "template": "auto",
            "template_date": "2024-07-26",
            "turns": "all",
            "batches": "",
            "max_source_len": 16,
            "max_target_len": 16,
            "train_on_source": False,
            "group_by_length": True,
            "pad_to_multiple_of": 8,
            "packing": False,
            "pack_length": 0,
            "max_examples": 0,
            "max_rows": 0,
            "streaming": False,
            "weights": (),
            "eval_path": "",
            "eval_examples": 4,
            "seed": 0,
        }
    )
    with section.ignore_type():
        section.update(changes)
    return section


def trained_on(data):
    assert isinstance(data.batches, Batches)
    return data.batches.examples


@pytest.fixture
def path(tmp_path):
    rows = [{"input": f"question {number}", "output": f"answer {number}"} for number in range(20)]
    rows[7]["output"] = "a much longer answer"
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def test_rows_become_batches(path, byte_tokenizer):
    data = load_data(config(path=path), byte_tokenizer, 5, 259)
    assert len(data.heldout) == 4 and len(trained_on(data)) == 16
    wheres = sorted(int(e.where.rpartition(" ")[2]) for e in [*data.heldout, *trained_on(data)])
    assert wheres == list(range(1, 21))
    batch = data.batches.batch(0)
    assert batch["tokens"].shape[0] == 5
    learned = byte_tokenizer.decode(batch["tokens"][0][batch["loss_mask"][0]])
    assert learned.startswith(("answer ", "a much"))
    assert sum(int(b["loss_mask"].sum()) for b in eval_batches(data.heldout, 5, 8, data.pad_id)) > 0


def test_report(path, byte_tokenizer):
    data = load_data(config(path=path, max_examples=10, eval_examples=2), byte_tokenizer, 4, 259)
    targets = sum(int(example.loss_mask.sum()) for example in trained_on(data))
    report = "\n".join(data.report)
    for part in (
        f"{path} (input-output): 20 rows, 10 examples",
        "only the first 10 by data.max_examples",
        "0 sources (max_source_len 16), 1 targets (max_target_len 16)",
        "train on 8 examples",
        f"{targets} of them targets",
        "2 held out; 2 steps an epoch",
    ):
        assert part in report
    assert {int(e.where.rpartition(" ")[2]) for e in [*data.heldout, *trained_on(data)]} == set(range(1, 11))


def test_rows_of_several_examples(tmp_path, byte_tokenizer):
    file = tmp_path / "tasks.jsonl"
    task = {"instruction": "I", "instances": [{"input": n, "output": "O"} for n in "abc"]}
    file.write_text(json.dumps(task) + "\n" + json.dumps(task | {"instances": []}))
    report = load_data(
        config(path=str(file), format="self-instruct", max_source_len=99, max_examples=2, eval_examples=0),
        byte_tokenizer, 2, 259,
    ).report  # fmt: skip
    assert report[:3] == [
        f"data: {file} (self-instruct): 2 rows, 2 examples",
        "data: 1 rows left out: no answer to learn",
        "data: only the first 2 by data.max_examples",
    ]
    whole = config(path=str(file), format="self-instruct", max_source_len=99, eval_examples=0)
    data = load_data(whole, byte_tokenizer, 2, 259)
    assert "2 rows, 3 examples" in data.report[0] and "only the first" not in "".join(data.report)


def test_a_bad_line_anywhere_stops_before_anything_runs(path, byte_tokenizer):
    with open(path, "a", encoding="utf-8") as file:
        file.write('\n{"input": "x"}\n{"input": "y"}')
    with pytest.raises(InputError, match=r'rows.jsonl, line 21: no field "output".* \(and 1 more bad row'):
        load_data(config(path=path, max_examples=5), byte_tokenizer, 4, 259)


def test_tokenizer_of_another_model(path, byte_tokenizer):
    with pytest.raises(InputError, match="token id 257, the model has embeddings for 200 tokens: tokenizer and model"):
        load_data(config(path=path), byte_tokenizer, 4, 200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "alpacca"}, "unknown data.format 'alpacca'"),
        ({"path": ""}, "set data.path"),
        ({"max_examples": -1}, "data.max_examples is -1"),
        ({"seed": -1}, "data.seed is -1"),
        ({"eval_examples": 20}, "nothing is left to train on"),
        ({"pad_to_multiple_of": 0}, "data.pad_to_multiple_of is 0"),
    ],
)
def test_bad_settings(path, byte_tokenizer, changes, message):
    with pytest.raises(InputError, match=message):
        load_data(config(**({"path": path} | changes)), byte_tokenizer, 4, 259)


def test_no_tokenizer(path):
    with pytest.raises(InputError, match="has no tokenizer"):
        load_data(config(path=path), None, 4, 259)


def test_nothing_to_learn(tmp_path, byte_tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "### Human: Q"}')
    with pytest.raises(InputError, match="none of its 1 rows has anything to learn"):
        load_data(config(path=str(tmp_path / "a.jsonl"), format="oasst1"), byte_tokenizer, 4, 259)


def test_batches_from_a_file(tmp_path):
    path = str(tmp_path / "b.npy")
    np.save(path, np.full((3, 2, 8), 5, np.int32))
    data = load_data(config(batches=path), None, 2, 6)
    assert isinstance(data.batches, FileBatches) and len(data.batches) == 3 and data.heldout == []
    assert "3 batches of 2 x 8 tokens" in data.report[0]
    said = load_data(config(batches=path), None, 4, 6).report[1]
    assert "steps of 2 sequences, as the file has them, not of 4" in said
    with pytest.raises(InputError, match="has token id 5, the model has 5 tokens"):
        load_data(config(batches=path), None, 2, 5)


def test_real_alpaca_with_a_real_tokenizer(shared_data):
    tokenizer = Tokenizer.from_folder(shared_data / "stories260K")
    section = config(path=str(shared_data / "alpaca" / "alpaca_small.json"), format="alpaca", eval_examples=100)
    section.max_source_len, section.max_target_len = 384, 128
    data = load_data(section, tokenizer, 16, 512)
    assert len(trained_on(data)) + len(data.heldout) == 2000
    example = trained_on(data)[0]
    assert tokenizer.decode(example.tokens[~example.loss_mask]).startswith("Below is an instruction")
    assert example.tokens[0] == 1 and example.tokens[-1] == 2
    assert all(len(example) <= 512 for example in trained_on(data))


def test_no_answer_of_todays_alpaca_is_cut(tmp_path, shared_data):
    """Answers as long as today's: at the paper's lengths 486 of 999 lost their end."""
    from configs import alpaca

    shutil.copyfile(shared_data / "tokenizers" / "llama2_32k" / "tokenizer.json", tmp_path / "tokenizer.json")
    tokenizer, section = Tokenizer.from_folder(tmp_path), alpaca.get_config().data
    section.path, section.eval_examples = str(shared_data / "alpaca" / "alpaca_en_demo.json"), 0
    data = load_data(section, tokenizer, 16, 32000, 2048)
    assert data.truncated == {"sources": 0, "targets": 0, "dropped": 0} and data.batches.longest_example == 799
    assert all(example.tokens[-1] == tokenizer.eos_id for example in trained_on(data))
    section.max_source_len, section.max_target_len = 384, 128
    data = load_data(section, tokenizer, 16, 32000, 2048)
    assert data.truncated == {"sources": 0, "targets": 486, "dropped": 0}
    ended = sum(example.tokens[-1] == tokenizer.eos_id for example in trained_on(data))
    assert ended == 999 - 486


def test_real_trees_with_a_real_tokenizer(tmp_path, shared_data):
    shutil.copyfile(shared_data / "tokenizers" / "llama2_32k" / "tokenizer.model", tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.from_folder(tmp_path)
    section = config(path=str(shared_data / "oasst1" / "en_100_tree.jsonl"), format="oasst1", max_target_len=512)
    data = load_data(section, tokenizer, 16, 32000)
    example = trained_on(data)[0]
    assert example.tokens[0] == 1 and example.loss_mask[1:].all()
    assert tokenizer.decode(example.tokens).startswith("### Human: ")
    assert max(len(example) for example in trained_on(data)) == 513


def test_held_out_examples_from_a_file_of_their_own(path, tmp_path, byte_tokenizer):
    other = tmp_path / "heldout.json"
    other.write_text(json.dumps([{"input": f"unseen {number}", "output": f"reply {number}"} for number in range(5)]))
    data = load_data(config(path=path, eval_path=str(other), eval_examples=0), byte_tokenizer, 4, 259)
    assert len(trained_on(data)) == 20
    assert len(data.heldout) == 5
    assert all("heldout.json" in example.where for example in data.heldout)
    assert len(load_data(config(path=path, eval_path=str(other), eval_examples=2), byte_tokenizer, 4, 259).heldout) == 2
    with pytest.raises(InputError, match="model has embeddings for 90 tokens"):
        load_data(config(path=path, eval_path=str(other)), byte_tokenizer, 4, 90)


def chat_config(tmp_path, rows, **changes):
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    lengths = {"max_source_len": 40, "max_target_len": 24, "eval_examples": 0}
    return config(**({"path": str(file), "format": "messages"} | lengths | changes))


def chat_tokenizer(tmp_path, golden, template=CHATML, stops=()):
    return with_template(tmp_path / "chat_tokenizer", golden / "chat", template, stops)


def test_chats_in_the_models_template(tmp_path, golden):
    tokenizer = chat_tokenizer(tmp_path, golden)
    question, answer = TWO_TURNS[:2]
    long = {"role": "assistant", "content": "word " * 60}
    rows = [TWO_TURNS[:2], [question, long], [*TWO_TURNS[:3], long], [{"role": "user", "content": "x " * 90}, answer]]
    section = chat_config(tmp_path, [*rows, [question]])
    data = load_data(section, tokenizer, 2, 500)
    assert [bool(e.loss_mask[-1]) for e in sorted(trained_on(data), key=lambda e: e.where)] == [False, True, True]
    assert data.report[:4] == [
        f"data: {section.path} (messages): 5 rows, 3 examples",
        "data: in the model's chat template (data.template=auto), its answers alone learned",
        "data: 1 rows left out: no answer to learn",
        "data: cut to length (data.max_source_len + data.max_target_len = 64 tokens): 1 chats end at an earlier "
        "answer, 1 first answers cut (learned without an end), 1 without room dropped",
    ]
    assert "the template ends turns with <|im_end|>, where generation does not stop" in data.report[4]
    assert "only the first" not in "".join(data.report)
    heldout = load_data(chat_config(tmp_path, rows, eval_path=section.path), tokenizer, 2, 500).heldout
    assert len(heldout) == 3


def test_answers_that_are_examples_of_their_own(tmp_path, golden):
    """The chats of a template that drops thinking: counted, one side of the split each, and the last answers alone."""
    tokenizer = chat_tokenizer(tmp_path, golden, RECENT, ["<|im_end|>"])
    rows = [
        [{**turn, "content": f"{turn['content']} {number}"} for turn in TWO_TURNS[: 4 if number % 3 else 2]]
        for number in range(12)
    ]
    section = chat_config(tmp_path, rows, max_source_len=300, eval_examples=5, packing=True)
    data = load_data(section, tokenizer, 2, 500)
    assert "8 chats are 16 examples, each answer as it is generated" in data.report[2]
    sides = [{example.where for example in side} for side in (data.batches.examples, data.heldout)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 12
    assert (len(data.batches.examples), len(data.heldout)) == (15, 5) and data.truncated["cut"] == 0
    last = chat_config(tmp_path, rows, max_source_len=300, turns="last")
    data = load_data(last, tokenizer, 2, 500)
    assert len(trained_on(data)) == 12 and "the last answer of each learned" in data.report[1]
    with pytest.raises(InputError, match="unknown data.turns 'lst'; known: all, last"):
        load_data(chat_config(tmp_path, rows, turns="lst"), tokenizer, 2, 500)
    with pytest.raises(InputError, match="data.turns is 'last', which is for chats .*data.template=paper takes"):
        load_data(chat_config(tmp_path, rows, turns="last", template="paper"), tokenizer, 2, 500)


def test_prompts_that_begin_otherwise_than_texts_say_so(tmp_path, golden, path, byte_tokenizer):
    report = load_data(config(path=path), byte_tokenizer, 4, 259).report
    assert "data: prompts begin with '<s>', as the paper's do; the tokenizer itself adds nothing" in report
    none = with_template(tmp_path / "none", golden / "chat", None, bos_token=None)
    assert "begin with" not in "".join(load_data(config(path=path), none, 4, 500).report)


def test_no_room_for_any_answer(tmp_path, golden):
    section = chat_config(tmp_path, [TWO_TURNS[:2]], max_source_len=2, max_target_len=2)
    with pytest.raises(InputError, match="none of its 1 chats has room for an answer .* = 4 tokens"):
        load_data(section, chat_tokenizer(tmp_path, golden), 1, 500)


def test_which_template(tmp_path, golden, path):
    tokenizer, row = chat_tokenizer(tmp_path, golden), TWO_TURNS[:2]

    def text(section, tokenizer=tokenizer):
        return tokenizer.decode(trained_on(load_data(section, tokenizer, 1, 500))[0].tokens)

    assert text(chat_config(tmp_path, [row])).startswith("user\nWhat")
    assert text(chat_config(tmp_path, [row], template="paper")).startswith("### Human: What")
    assert text(chat_config(tmp_path, [row]), chat_tokenizer(tmp_path, golden, None)).startswith("### Human: What")
    assert text(config(path=path, max_target_len=99)).startswith("question ")
    assert text(config(path=path, max_target_len=99, template="chat")).startswith("user\nquestion ")
    with pytest.raises(InputError, match="has no chat template"):
        text(config(path=path, template="chat"), chat_tokenizer(tmp_path, golden, None))
    with pytest.raises(InputError, match="unknown data.template 'chatml'; known: auto, paper, chat"):
        text(config(path=path, template="chatml"))
    with pytest.raises(InputError, match="data.template_date is '26 Jul'; expected a day as YYYY-MM-DD"):
        text(chat_config(tmp_path, [row], template_date="26 Jul"))


def test_rows_without_lengths_are_whole_up_to_the_context(path, byte_tokenizer):
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"input": "q" * 50, "output": "a" * 100}))
        file.write("\n" + json.dumps({"input": "q" * 300, "output": "a"}))
    section = config(path=path, max_source_len=0, max_target_len=0, eval_examples=0)

    def read(context, **changes):
        section.update(changes)
        data = load_data(section, byte_tokenizer, 4, 259, context)
        return data, {e.where.rpartition(" ")[2]: e for e in trained_on(data)}

    data, whole = read(1000)
    assert len(whole) == 22 and len(whole["21"]) == 152 and len(whole["22"]) == 303
    assert whole["21"].tokens[-1] == whole["22"].tokens[-1] == byte_tokenizer.eos_id
    assert data.report[1] == f"data: the longest example has 303 tokens ({path}, line 22); 99% have at most 303"
    assert data.truncated == {"sources": 0, "targets": 0, "dropped": 0} and data.batches.max_length == 304
    assert [len(e) for e in trained_on(load_data(section, byte_tokenizer, 4, 259))] == [*map(len, whole.values())]

    data, cut = read(100)
    assert len(cut) == 21 and len(cut["21"]) == 100 and cut["21"].tokens[-1] == ord("a") and cut["21"].loss_mask[-1]
    assert data.truncated == {"sources": 0, "targets": 1, "dropped": 1}
    assert data.report[1:3] == [
        "data: cut to length: 1 targets (the model's context of 100 tokens), which are learned without an end",
        "data: 1 examples left out: nothing to learn within the model's context of 100 tokens",
    ]
    # one length alone, and the context's share of the other
    data, one = read(100, max_source_len=10)
    assert [len(one[n]) for n in ("21", "22")] == [100, 12] and data.truncated["sources"] == 22
    data, one = read(100, max_source_len=0, max_target_len=20)
    assert len(one["21"]) == 71 and "22" not in one
    # given lengths are kept whatever the context
    assert max(map(len, read(10, max_source_len=60, max_target_len=20)[1].values())) == 71
    with pytest.raises(InputError, match="none of its 22 examples has room for a token .* context of 5 tokens; make"):
        read(5, max_source_len=0, max_target_len=0)


def test_the_longest_example_is_known_without_a_run(path, tmp_path, byte_tokenizer, monkeypatch):
    other = tmp_path / "heldout.jsonl"
    other.write_text(json.dumps({"input": "unseen", "output": "a" * 80}))
    section = config(path=path, max_source_len=0, max_target_len=0)
    assert longest_example(section, byte_tokenizer, 259, 1000) == 1 + len("question 7" + "a much longer answer") + 1
    section.eval_path = str(other)
    assert longest_example(section, byte_tokenizer, 259, 1000) == 88
    assert longest_example(section, byte_tokenizer, 259, 50) == 50
    # what was read for that is there for the run
    monkeypatch.setattr("qlora_jax.feed.tokenized.write_examples", None)
    assert "read from what is kept" in load_data(section, byte_tokenizer, 4, 259, 1000).report[-1]


def test_packed_rows_hold_the_longest(path, tmp_path, byte_tokenizer):
    section = config(path=path, max_source_len=0, max_target_len=0, packing=True)
    data = load_data(section, byte_tokenizer, 4, 259, 1000)
    assert data.batches.max_length == 32
    other = tmp_path / "heldout.jsonl"
    other.write_text(json.dumps({"input": "unseen", "output": "a" * 80}))
    section.eval_path = str(other)
    data = load_data(section, byte_tokenizer, 4, 259, 1000)
    assert data.batches.max_length == 88
    assert next(data.eval_batches(data.heldout, 1))["tokens"].shape == (1, 88)
    section.pack_length = 40
    with pytest.raises(InputError, match="heldout.jsonl, line 1: 88 tokens do not fit into packed rows of 40"):
        load_data(section, byte_tokenizer, 4, 259, 1000)


def test_chats_have_the_context_together(tmp_path, golden):
    long = {"role": "assistant", "content": "word " * 60}
    tokenizer, question = chat_tokenizer(tmp_path, golden), TWO_TURNS[0]
    rows = [TWO_TURNS[:2], [*TWO_TURNS[:3], long], [{"role": "user", "content": "x " * 90}, TWO_TURNS[1]]]
    section = chat_config(tmp_path, rows, max_source_len=0, max_target_len=0)
    whole = load_data(section, tokenizer, 2, 500, 1000)
    assert len(trained_on(whole)) == 3 and "cut to length" not in "".join(whole.report)
    data = load_data(section, tokenizer, 2, 500, 64)
    assert len(trained_on(data)) == 2
    assert (
        "data: cut to length (the model's context of 64 tokens): 1 chats end at an earlier answer, 0 first answers "
        "cut (learned without an end), 1 without room dropped"
    ) in data.report
    assert any("generation does not stop" in line for line in data.report)
    with pytest.raises(InputError, match="none of its 1 chats has room for an answer in the model's context of 4 tok"):
        load_data(chat_config(tmp_path, [[question, long]], max_source_len=0, max_target_len=0), tokenizer, 2, 500, 4)
    with pytest.raises(InputError, match="data.max_source_len is 40 and data.max_target_len 0, but .* give both, or"):
        load_data(chat_config(tmp_path, rows, max_target_len=0), tokenizer, 2, 500, 64)


def test_padding_is_never_an_end_token(tmp_path, golden):
    for end, pad in (("</s>", 0), ("<s>", 1)):  # ids 1 and 0
        tokenizer = with_template(tmp_path / "padded", golden / "chat", CHATML, bos_token=None, eos_token=end)
        assert tokenizer.eos_id == 1 - pad
        data = load_data(chat_config(tmp_path, [TWO_TURNS[:2], TWO_TURNS]), tokenizer, 2, 500)
        batch = data.batches.batch(0)
        lengths = sorted(len(example) for example in trained_on(data))
        rows = [tokens[lengths[0] :] for tokens in batch["tokens"] if tokens[-1] == pad]
        assert data.pad_id == pad and pad not in tokenizer.eos_ids and len(rows) >= 1
        for tokens, mask in zip(batch["tokens"], batch["loss_mask"], strict=True):
            assert not mask[tokens == pad].any()


def test_what_a_run_learns_from_is_known_by_its_content(tmp_path, byte_tokenizer):
    """Examples, not bytes of files: what changes no token changes nothing, and each part of the way is told apart."""
    rows = [{"input": f"q{n}", "output": f"a{n}"} for n in range(20)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)

    def inputs(name: str, text: str, **changes):
        (tmp_path / name).write_text(text)
        return load_data(config(path=str(tmp_path / name), **changes), byte_tokenizer, 4, 300).inputs

    def of(text: str, **changes):
        return inputs("rows.jsonl", text, **changes)["data.path"]

    first = of(lines)
    assert [name for name, _ in first.parts] == [str(tmp_path / "rows.jsonl"), "the tokenizer"]
    spaced = inputs("spaced.json", json.dumps([row | {"id": 1} for row in rows], indent=1))["data.path"]
    assert spaced.content == first.content
    assert spaced.parts[0][1] != first.parts[0][1] and spaced.parts[1] == first.parts[1]
    assert of(lines, seed=3, packing=True, eval_examples=2) == first
    changed = [of(lines.replace("a7", "a8")), of("\n".join(lines.splitlines()[::-1])), of(lines, train_on_source=True)]
    assert len({first.content, *(found.content for found in changed)}) == 4
    both = inputs("rows.jsonl", lines, eval_path=str(tmp_path / "spaced.json"), eval_examples=4)
    assert both["data.path"] == first
    assert both["data.eval_path"].content == of(lines, max_examples=4, eval_examples=0).content


def test_the_chat_template_is_named_where_it_is_used(tmp_path, golden):
    found = []
    for template in (CHATML, CHATML.replace("<|im_start|>", "<|im_start|> ")):
        tokenizer = with_template(tmp_path / "chat_tokenizer", golden / "chat", template)
        found.append(load_data(chat_config(tmp_path, [TWO_TURNS]), tokenizer, 1, 500).inputs["data.path"])
    old, new = found
    assert old.content != new.content and [name for name, _ in new.parts][1:] == ["the tokenizer", "the chat template"]
    assert [before == after for before, after in zip(old.parts, new.parts, strict=True)] == [True, True, False]
