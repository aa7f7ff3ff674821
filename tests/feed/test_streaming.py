"""Hub data sets read file by file, against a server on this machine; what a run that is cut off leaves for the next."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from qlora_jax.data.detect import find_format
from qlora_jax.errors import InputError
from qlora_jax.feed import tokenized
from qlora_jax.feed.cache import cache_folder
from qlora_jax.feed.load import load_data
from tests.feed.test_load import config
from tests.hub_server import SHA, HubHandler, serving

NAMES = [f"data/train-{number:05}-of-00003.parquet" for number in range(3)]


class Hub(HubHandler):
    requests: list[tuple[str, str]] = []
    files: dict[str, bytes] = {}
    closed: set[str] = set()  # files that the server fails to give
    tells_contents = True

    def find(self, path):
        parts = path.removeprefix("/api").strip("/").split("/")
        if parts[1:3] != ["owner", "large"]:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            if self.tells_contents:
                for sibling in siblings:
                    data = self.files[sibling["rfilename"]]
                    sibling |= {"blobId": hashlib.sha1(data).hexdigest(), "size": len(data)}
            return 200, {}, json.dumps({"id": "owner/large", "sha": SHA, "siblings": siblings}).encode()
        name = "/".join(parts[5:])
        if name in self.closed:
            return 403, {"X-Error-Code": "GatedRepo"}, b""  # a failure that huggingface_hub does not try again
        return 200, {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha1(self.files[name]).hexdigest()}"'}, self.files[name]

    @classmethod
    def fetched(cls):
        """Names of the files that were asked for since the last call, each once, in order."""
        names = [path.rpartition("/")[2] for path, _ in cls.requests if "/resolve/" in path]
        cls.requests.clear()
        return [int(name[6:11]) for name in dict.fromkeys(names)]


def parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def rows(shard, count=4):
    return [{"prompt": f"q{shard}{number}", "completion": f"answer {number}"} for number in range(count)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Hub.requests.clear()
    Hub.files = {name: parquet(rows(number)) for number, name in enumerate(NAMES)} | {"README.md": b"# card"}
    Hub.closed, Hub.tells_contents = set(), True
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "kept"))
    with serving(Hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield tmp_path


def load(tokenizer, path="owner/large", **changes):
    section = {"path": path, "format": "auto", "eval_examples": 0, "streaming": True} | changes
    return load_data(config(**section), tokenizer, 2, 259)


def questions(data, tokenizer):
    return sorted(tokenizer.decode(example.tokens[~example.loss_mask])[-3:] for example in data.batches.examples)


ALL = [f"q{shard}{number}" for shard in range(3) for number in range(4)]


def test_files_are_fetched_one_at_a_time_and_never_kept(hub, byte_tokenizer, monkeypatch):
    there = []
    read = tokenized.stream_rows

    def watched(path, label, columns):
        there.append(sorted(file.name for file in hub.rglob("*.parquet")))
        return read(path, label, columns)

    monkeypatch.setattr(tokenized, "stream_rows", watched)
    data = load(byte_tokenizer)
    assert questions(data, byte_tokenizer) == ALL and Hub.fetched() == [0, 1, 2]
    assert there == [[Path(name).name] for name in NAMES]
    assert not list(hub.rglob("*.parquet")) and not (hub / "hub").exists()
    assert data.report[0] == "data: owner/large (prompt-completion, found from its rows): 12 rows, 12 examples"
    assert "data: streamed 3 of the 3 files of owner/large: 3 fetched now, each deleted" in data.report[-1]
    assert data.batches.examples[5].where == f"owner/large:{NAMES[1]}, row 2"
    again = load(byte_tokenizer, seed=1, packing=True)
    assert Hub.fetched() == [] and again.inputs == data.inputs and ": 0 fetched now" in again.report[-1]


def test_a_run_that_was_cut_off_goes_on_with_the_next_file(hub, byte_tokenizer):
    Hub.closed = {NAMES[1]}
    with pytest.raises(InputError, match=f"owner/large:{NAMES[1]}: its owner grants access on request"):
        load(byte_tokenizer)
    assert not list(hub.rglob("*.partial"))
    Hub.closed = set()
    Hub.fetched()
    assert questions(load(byte_tokenizer), byte_tokenizer) == ALL and Hub.fetched() == [1, 2]
    Hub.files[NAMES[2]] = parquet(rows(5))  # one file changed, under the same name
    assert "q50" in questions(load(byte_tokenizer), byte_tokenizer) and Hub.fetched() == [2]


def test_rows_that_bound_it(hub, byte_tokenizer):
    data = load(byte_tokenizer, max_rows=6)
    assert questions(data, byte_tokenizer) == ALL[:6] and Hub.fetched() == [0, 1]
    assert "streamed 2 of the 3 files" in data.report[-1]
    assert "data: at most 6 rows are read, by data.max_rows" in data.report
    load(byte_tokenizer, max_rows=6)
    assert Hub.fetched() == []
    assert questions(load(byte_tokenizer, max_examples=5), byte_tokenizer) == ALL[:5]


def test_tokens_stand_in_where_the_hub_is_not_reached(hub, byte_tokenizer, monkeypatch):
    data = load(byte_tokenizer)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    again = load(byte_tokenizer)
    assert again.inputs == data.inputs
    assert any("the hub cannot be reached: the files of owner/large are those" in line for line in again.report)
    with pytest.raises(InputError, match="owner/large: no local file, and the hub cannot be reached"):
        load(byte_tokenizer, revision="other")


def test_the_format_is_found_in_the_first_file(hub):
    assert find_format("owner/large") == "prompt-completion" and Hub.fetched() == [0]


def test_a_hub_that_does_not_tell_contents(hub, byte_tokenizer):
    Hub.tells_contents = False
    load(byte_tokenizer)
    assert Hub.fetched() == [0, 1, 2]
    load(byte_tokenizer)
    assert Hub.fetched() == []


def test_a_pattern_and_another_set_beside_it(hub, byte_tokenizer):
    local = hub / "own.jsonl"
    local.write_text(json.dumps({"input": "own", "output": "o"}) + "\n")
    data = load(byte_tokenizer, "owner/large:data/*-0000[12]-*.parquet", streaming=False)
    assert questions(data, byte_tokenizer) == ALL[4:] and list(hub.rglob("*.parquet"))
    data = load(byte_tokenizer, "owner/large:data/*-0000[12]-*.parquet", weights=("2",), eval_path=str(local))
    assert questions(data, byte_tokenizer) == ALL[4:] and len(data.heldout) == 1
    with pytest.raises(InputError, match="owner/large has no data file like x/[*].parquet; its files: README.md"):
        load(byte_tokenizer, "owner/large:x/*.parquet")
    with pytest.raises(InputError, match="owner/large:x.parquet: no such file in the data set at revision 'main'"):
        load(byte_tokenizer, "owner/large:x.parquet")
    with pytest.raises(InputError, match="data.streaming is for data sets of the hub .*own.jsonl is none: leave it"):
        load(byte_tokenizer, f"owner/large,{local}")


def test_files_whose_rows_are_not_of_one_form(hub, byte_tokenizer):
    Hub.files[NAMES[1]] = parquet([{"instruction": "I", "output": "O"}])
    with pytest.raises(InputError, match=f"{NAMES[0]} has rows of data.format=prompt-completion and .* of alpaca; set"):
        load(byte_tokenizer)
    Hub.files[NAMES[1]] = b"PAR1 no parquet"
    with pytest.raises(InputError, match=f"{NAMES[1]}: not a readable Parquet file"):
        load(byte_tokenizer)
    assert not list(cache_folder().rglob("raw"))


def test_a_file_without_an_answer_among_others(hub, byte_tokenizer):
    Hub.files[NAMES[1]] = parquet([{"prompt": "q", "completion": " "}])
    data = load(byte_tokenizer)
    assert questions(data, byte_tokenizer) == ALL[:4] + ALL[8:]
    assert "data: 1 rows left out: no answer to learn" in data.report


def test_a_full_disk_is_one_clear_line(hub, byte_tokenizer, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenized, "write_examples", full)
    with pytest.raises(InputError, match="the tokenized data cannot be kept in .*kept: No space left on device; free"):
        load(byte_tokenizer)
    assert not list(hub.rglob("*.parquet"))
