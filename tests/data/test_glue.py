"""Rows of GLUE: the owners' files and the hub's, their labels, and how pairs are cut to length."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer as Rust
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import RobertaProcessing
from tokenizers.trainers import BpeTrainer

from qlora_jax.data.examples import Lengths
from qlora_jax.data.glue.examples import as_label, as_token, rooms, tokenize_labelled
from qlora_jax.data.glue.rows import Labelled, read_rows
from qlora_jax.data.glue.tasks import PAPER, TASKS, task_named, task_of
from qlora_jax.errors import InputError
from qlora_jax.feed.labelled import write_labelled
from qlora_jax.feed.store import ExampleStore
from qlora_jax.text.tokenizer import Tokenizer
from tests.conftest import TESTS

QUOTES = 'the "sun" is\tone more "text'  # an odd quotation mark, which ends no field
# the owners' files: header (or none) and a row; what the row says
OWNERS = {
    "cola": (None, "gj04\t1\t\tthe sun \"sings.", ('the sun "sings.',), 1),
    "sst2": ("sentence\tlabel", "a \"red tree \t0", ('a "red tree ',), 0),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", f"1\t7\t8\t{QUOTES}", tuple(QUOTES.split("\t")), 1),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", f"0\t1\t2\t{QUOTES}\t0",
        tuple(QUOTES.split("\t")), 0,
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        f"0\tg\tf\t2012\t1\tn\tn\t{QUOTES}\t3.800", tuple(QUOTES.split("\t")), 3.8,
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        f"0\t1\t1n\tfiction\t( a )\t{QUOTES}\tneutral\tcontradiction", tuple(QUOTES.split("\t")), 2,
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", f"0\t{QUOTES}\tnot_entailment", tuple(QUOTES.split("\t")), 1),
    "rte": ("index\tsentence1\tsentence2\tlabel", f"0\t{QUOTES}\tentailment", tuple(QUOTES.split("\t")), 0),
    "wnli": ("index\tsentence1\tsentence2\tlabel", f"0\t{QUOTES}\t1", tuple(QUOTES.split("\t")), 1),
}  # fmt: skip


def read(task: str, file: Path, torn: list | None = None) -> list[Labelled]:
    return list(read_rows(TASKS[task], [(str(file), file)], [] if torn is None else torn))


@pytest.mark.parametrize("name", OWNERS)
def test_the_owners_files(name, tmp_path):
    header, row, texts, label = OWNERS[name]
    file = tmp_path / ("msr_paraphrase_train.txt" if name == "mrpc" else "train.tsv")
    file.write_text("\n".join([*([header] if header else []), row, ""]), encoding="utf-8-sig")
    assert read(name, file) == [Labelled(texts, label, f"{file}, line {1 + bool(header)}")]


@pytest.mark.parametrize("name", OWNERS)
def test_the_hubs_files(name, tmp_path):
    task = TASKS[name]
    columns, column = task.forms[0]
    label = 2.5 if name == "stsb" else len(task.labels) - 1
    row = {text: [f"the {text}"] for text in columns} | {column: [label], "idx": [0]}
    pq.write_table(pa.table(row), tmp_path / "train.parquet")
    (tmp_path / "train.jsonl").write_text(json.dumps({key: value[0] for key, value in row.items()}) + "\n")
    for file in ("train.parquet", "train.jsonl"):
        (found,) = read(name, tmp_path / file)
        assert found.texts == tuple(f"the {text}" for text in columns) and found.label == label


def test_torn_lines_of_qqp_are_left_out_and_of_others_an_error(tmp_path):
    header, row, *_ = OWNERS["qqp"]
    (tmp_path / "qqp.tsv").write_text(f"{header}\n{row}\n3\t4\n{row}\n")
    torn: list[str] = []
    assert len(read("qqp", tmp_path / "qqp.tsv", torn)) == 2 and torn == [f"{tmp_path / 'qqp.tsv'}, line 3"]
    (tmp_path / "rte.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\n")
    with pytest.raises(InputError, match="line 2: 3 fields between tabs, expected 4: index, sentence1"):
        read("rte", tmp_path / "rte.tsv")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rte", "sentence1\tsentence2\tlabel\na\tb\tmaybe", "label is 'maybe'; labels of rte are entailment"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\t2", "label is '2'; labels of rte are"),
        ("rte", "sentence1\tsentence2\tlabel\na\tb\t-1", "hidden label of a test set"),
        ("rte", "index\tsentence1\tsentence2\n0\ta\tb", r"no column 'label' \(a test set"),
        ("rte", "index\tsentence1\tlabel\n0\ta\t1", "no column 'sentence2'; rows of rte have sentence1, "),
        ("rte", "sentence1\tsentence2\tlabel\n \tb\t1", "the field sentence1 is empty"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan", "score is 'nan'; expected a number"),
        ("cola", "sentence\tlabel\na b\t1", "2 fields between tabs, expected 4: source, label, mark, sentence"),
        ("mnli", "sentence1\tsentence2\tgold_label\na\tb\t-\na\tb\t1\nc\td\t?", "1 more bad row"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line(name, text, message, tmp_path):
    (tmp_path / "train.tsv").write_text(text + "\n")
    with pytest.raises(InputError, match=message) as error:
        read(name, tmp_path / "train.tsv")
    assert "\n" not in str(error.value) and f"{tmp_path / 'train.tsv'}, line " in str(error.value)


def test_a_task_is_found_by_names():
    for path, name in (
        ("glue_data/CoLA/train.tsv", "cola"),
        ("/data/SST-2/dev.tsv", "sst2"),
        ("STS-B/train.tsv.gz", "stsb"),
        ("nyu-mll/glue:mnli/validation_matched-*.parquet", "mnli"),
        ("rte/qnli.jsonl", "qnli"),
    ):
        assert task_of("", path).name == name
        assert task_of("wnli", path).name == "wnli"
    with pytest.raises(InputError, match="neither its name nor data.task says"):
        task_of("", "rows/train.tsv")
    with pytest.raises(InputError, match=r"did you mean mrpc\?"):
        task_named("mprc")
    assert len(PAPER) == 8


def test_pairs_are_cut_as_tokenizers_cuts_them():
    """longest_first of the library that transformers calls."""
    tokenizer = Rust(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    for room in (1, 4, 7, 10):
        tokenizer.enable_truncation(room, strategy="longest_first")
        for a in range(12):
            for b in range(12):
                whole = tokenizer.encode(" ".join("a" * a), " ".join("b" * b))
                kept = [whole.sequence_ids.count(0), whole.sequence_ids.count(1)]
                assert list(rooms(a, b, room)) == kept, (a, b, room)


def test_rows_are_as_robertas_tokenizer_makes_them(tmp_path):
    """Files as RoBERTa's folders have them: byte-level BPE, RobertaProcessing, tokens named in config.json alone."""
    rust = Rust(BPE(unk_token="<unk>"))
    rust.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=ByteLevel.alphabet())
    rust.train_from_iterator(["the quick brown fox"] * 3, trainer)
    rust.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    rust.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}')
    rows = [Labelled(("the quick fox", " brown dog\u00e9 "), 1, "x, line 1"), Labelled(("fox",), 0, "x, line 2")]
    rust.enable_truncation(12, strategy="longest_first")
    examples, _ = tokenize_labelled(rows, Tokenizer.from_folder(tmp_path), 2, 12)
    for example, row in zip(examples, rows, strict=True):
        assert example.tokens.tolist() == [*rust.encode(*row.texts).ids, row.label]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TESTS / "golden" / "tokenizer")


def test_examples(tokenizer):
    """<s> A </s>, <s> A </s></s> B </s>, and the label, the only target."""
    rows = [Labelled(("the sun",), 1, "x, line 1"), Labelled(("the sun", "a tree"), 2, "x, line 2")]
    (one, pair), cut = tokenize_labelled(rows, tokenizer, 3, 64)
    a, b = tokenizer.encode("the sun"), tokenizer.encode("a tree")
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert one.tokens.tolist() == [bos, *a, eos, 1]
    assert pair.tokens.tolist() == [bos, *a, eos, eos, *b, eos, 2]
    assert [np.flatnonzero(example.loss_mask).tolist() for example in (one, pair)] == [[len(one) - 1], [len(pair) - 1]]
    assert cut == 0
    shorter, cut = tokenize_labelled(rows, tokenizer, 3, 7)
    assert [len(example) for example in shorter] == [min(len(a) + 3, 8), 8] and cut == (len(a) > 5) + 1
    with pytest.raises(InputError, match="rows of 4 tokens have no room"):
        tokenize_labelled(rows, tokenizer, 3, 4)


@pytest.mark.parametrize("label", [0.0, 3.8, -1.25, 5.0])
def test_numbers_go_through_tokens(label):
    assert as_label(as_token(label, 1), 1) == np.float32(label)
    assert -(2**31) <= as_token(label, 1) < 2**31


def test_a_label_is_no_token_of_the_vocabulary(tokenizer, tmp_path):
    """The entry of a regression: the highest token is a text's, though the labels' bits are larger numbers."""
    header, row, *_ = OWNERS["stsb"]
    (tmp_path / "train.tsv").write_text("\n".join([header, *[row] * 5, ""]))
    files = [(str(tmp_path / "train.tsv"), tmp_path / "train.tsv")]
    facts = write_labelled(tmp_path / "out", files, TASKS["stsb"], tokenizer, Lengths(0, 0, 64), 3, 4)
    store = ExampleStore.open(tmp_path / "out", facts["places"])
    assert len(store) == facts["examples"] == 3 and facts["rows"] == facts["made"] == 4
    assert facts["highest_token"] == max(int(example.tokens[:-1].max()) for example in store) < 400
    assert as_label(int(store[2].tokens[-1]), 1) == np.float32(3.8)
