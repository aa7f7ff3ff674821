"""The data command, run as a user does."""

import gzip
import json
import shutil

import pytest

from qlora_jax.data.known import KNOWN_SETS
from tests.chat_templates import CHATML
from tests.conftest import REPOSITORY
from tests.data.test_chat_examples import with_template

pytestmark = pytest.mark.quick_compile

ROW = b'{"instruction": "I", "output": "O"}\n'
BAD_FILES = {
    "broken.jsonl": ROW + b'{"instruction": "I", "out\n' + ROW + b"7\n",
    "columns.csv": b"question,answer\nQ,A\n",
    "short.csv": b"instruction,input,output\nI,,O\nI\n",
    "list.json": b"[]",
    "blank.jsonl": b"\n\n",
    "header.csv": b"instruction,input,output\n",
    "latin.jsonl": ROW + '{"instruction": "I", "output": "\xe9"}\n'.encode("latin-1"),
    "utf16.json": '[{"instruction": "I", "output": "O"}]'.encode("utf-16"),
    "cut.json": b'[{"instruction": "I", "output": "O"}, {"inst',
    "cut.parquet": b"PAR1\x00\x00",
    "cut.jsonl.gz": gzip.compress(ROW * 50)[:-9],
    "rows.txt": ROW,
    "answers.jsonl": b'{"instruction": "I", "output": " "}\n',
}
WORDS = {
    "broken.jsonl": ["line 2: not valid JSON", "and 1 more bad row"],
    "columns.csv": ['line 2: no field "instruction"', "fields found: question, answer"],
    "short.csv": ["line 3: 1 fields, expected 3 as in the header"],
    "list.json": ["list.json has no rows"],
    "blank.jsonl": ["blank.jsonl has no rows"],
    "header.csv": ["header.csv has no rows"],
    "latin.jsonl": ["line 2: not UTF-8 (byte 0xe9); convert the file to UTF-8"],
    "utf16.json": ["line 1: not UTF-8 (byte 0xff)"],
    "cut.json": ["line 1: not valid JSON"],
    "cut.parquet": ["not a readable Parquet file"],
    "cut.jsonl.gz": ["damaged or cut off gzip file", "fetch it again"],
    "rows.txt": ["unknown kind of file"],
    "answers.jsonl": ["answers.jsonl: none of its 1 rows has anything to learn"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def results(run_commands, folder):
    chats = [{"messages": [{"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": "A"}]} for n in "ab"]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "zero.json").write_text("")
    chosen = [*chats[0]["messages"][:1], {"role": "assistant", "content": "B"}]
    (folder / "trl.jsonl").write_text(json.dumps({"chosen": chats[0]["messages"], "rejected": chosen}) + "\n")
    base = [
        "experiments.data",
        "--config=configs/quickstart.py",
        "--config.data.eval_path=",
        "--config.data.eval_examples=0",
    ]
    chat = [*base, f"--config.data.path={folder / 'chats.jsonl'}"]
    model = folder / "model"
    with_template(model, REPOSITORY / "tests" / "golden" / "chat", CHATML, ["<|im_end|>"])
    shutil.copyfile(REPOSITORY / "assets" / "tiny_llama" / "config.json", model / "config.json")
    commands = {
        "template": [*chat, f"--config.model.path={model}", "--config.data.format=messages", "--show=1"],
        "chats": [
            *chat,
            "--config.data.format=messages",
            "--show=1",
            f"--out={folder / 'out' / 'figures.json'}",
            f"--png={folder / 'out' / 'figures.png'}",
            "--config.data.packing",
        ],
        "color": [*chat, "--config.data.format=messages", "--show=1", "--color=always"],
        "wrong format": chat,
        "zero": [*base, f"--config.data.path={folder / 'zero.json'}"],
        "unknown": [*base, "--config.data.path=alpacca"],
        "batches": [*base, "--config.data.batches=b.npy"],
        "png folder": [*chat, "--config.data.format=messages", f"--png={folder}"],
        "several": [
            *base,
            f"--config.data.path={folder / 'chats.jsonl'},{folder / 'trl.jsonl'}",
            "--config.data.format=auto",
            "--config.data.weights=0.25,0.75",
            "--show=0",
            "--config.data.packing=false",
            f"--out={folder / 'several.json'}",
        ],
        "weights": [*chat, "--config.data.format=messages", "--config.data.weights=1,2"],
        "not clear": [*base, f"--config.data.path={folder / 'trl.jsonl'}", "--config.data.format=alpaca,dolly"],
        "no hub": [*chat, "--config.data.format=messages", "--config.data.streaming"],
        "help": ["experiments.data", "--helpfull"],
    }
    for name, content in BAD_FILES.items():
        (folder / name).write_bytes(content)
        commands[name] = [*base, f"--config.data.path={folder / name}"]
    return dict(zip(commands, run_commands(list(commands.values())), strict=True))


def test_examples_and_figures(results, folder):
    result = results["chats"]
    assert result["status"] == 0, result["err"]
    for part in (
        "chats.jsonl, line 1: ",
        "<BOS>⟦### Human: Qa\n### Assistant: A<EOS>⟧",
        "(messages): 2 rows, 2 examples",
        "padding: ",
    ):
        assert part in result["out"]
    assert "line 2" not in result["out"]
    figures = json.loads((folder / "out" / "figures.json").read_text())
    assert figures["examples"] == 2 and figures["heldout"] == 0
    assert figures["tokens"] == figures["targets"] + 2
    assert figures["packing"] and figures["truncated"] == {"sources": 0, "targets": 0, "dropped": 0}
    packed = next(method for name, method in figures["padding_by_method"].items() if name.startswith("packed to "))
    assert packed["rows"] == 1 and packed["waste"] == figures["padding"]
    assert {"shuffled", "grouped by length"} < set(figures["padding_by_method"])
    assert (folder / "out" / "figures.png").read_bytes().startswith(b"\x89PNG")
    assert "grouped by length" in result["out"] and "1 rows of 2.0 examples" in result["out"]
    assert "\x1b[32m" in results["color"]["out"] and "⟦" not in results["color"]["out"]


def test_chats_in_the_models_template(results):
    result = results["template"]
    assert result["status"] == 0, result["err"]
    assert "<|im_start|>user\nQa<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n" in result["out"]
    assert "in the model's chat template (data.template=auto)" in result["out"]


def test_errors(results, assert_one_line_error):
    assert_one_line_error(
        results["wrong format"], ["line 1", 'no field "instruction"', "data.format=messages reads it"]
    )
    assert_one_line_error(results["zero"], ["zero.json is empty (0 bytes)"])
    assert_one_line_error(results["unknown"], ["alpacca: no such file", *KNOWN_SETS])
    assert_one_line_error(results["png folder"], ["--png=", "is a folder"])
    assert_one_line_error(results["batches"], ["data.batches", "give data.path"])


def test_several_data_sets_and_their_shares(results, assert_one_line_error, folder):
    result = results["several"]
    assert result["status"] == 0, result["err"]
    for part in (
        "chats.jsonl (messages, found from its rows): 2 rows, 2 examples",
        "trl.jsonl (preference, found from its rows): 1 rows, 1 examples",
        "data: of each pair the chosen answer is learned, as if there were no other; rejected is not used",
        "data: 75.0% of the examples drawn are of ",
    ):
        assert part in result["out"]
    sources = json.loads((folder / "several.json").read_text())["sources"]
    assert [(source["format"], source["rows"], source["share"]) for source in sources] == [
        ("messages", 2, 0.25),
        ("preference", 1, 0.75),
    ]
    assert_one_line_error(results["weights"], ["data.weights has 2 weights and data.path 1 data sets"])
    assert_one_line_error(results["not clear"], ["data.format has 2 formats (alpaca, dolly) and data.path 1 data sets"])
    assert_one_line_error(results["no hub"], ["data.streaming is for data sets of the hub", "leave it off"])


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(results, assert_one_line_error, name):
    assert_one_line_error(results[name], [name, *WORDS[name]])


def test_help_lists_the_known_sets(results):
    assert all(name in results["help"]["out"] for name in KNOWN_SETS)
