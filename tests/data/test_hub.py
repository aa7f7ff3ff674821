"""Hub data sets, against a server on this machine that speaks the few requests huggingface_hub makes."""

import gzip
import importlib
import json

import pytest
from huggingface_hub import constants

from qlora_jax.data.formats import FORMATS
from qlora_jax.data.hub import choose_train_files, looks_like_dataset
from qlora_jax.data.known import KNOWN_SETS, KnownSet
from qlora_jax.data.read import SUFFIXES, read_rows
from qlora_jax.errors import InputError
from tests.hub_server import SHA, TOKEN, HubHandler, serving


def lines(*outputs):
    return "".join(json.dumps({"input": "", "output": output}) + "\n" for output in outputs).encode()


DATASETS = {
    "owner/clear": {
        "README.md": b"# card",
        "dataset_infos.json": b"{}",
        "train.jsonl": lines("a"),
        "test.jsonl": lines("b"),
    },
    "owner/packed": {"trees.jsonl.gz": gzip.compress(lines("p"), mtime=0)},
    "owner/several": {"helpful/train.jsonl": lines("h"), "harmless/train.jsonl": lines("x")},
    "owner/broken": {"train.jsonl": lines("a") + b"{\n"},
    "owner/closed": {},
    "owner/gated": {},
}


class Hub(HubHandler):
    requests: list[tuple[str, str]] = []

    def find(self, path):
        parts = path.removeprefix("/api").strip("/").split("/")
        repo = "/".join(parts[1:3])
        if repo == "owner/closed":
            return 500, {}, b""
        if repo == "owner/gated":
            return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": TOKEN}, b""
        if repo not in DATASETS:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision, file = parts[4], "/".join(parts[5:])
        if revision not in ("main", SHA):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in DATASETS[repo]]
            return 200, {}, json.dumps({"id": repo, "sha": SHA, "siblings": siblings}).encode()
        if file not in DATASETS[repo]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA}, b""
        return 200, {"X-Repo-Commit": SHA, "ETag": f'"{abs(hash((repo, file))):x}"'}, DATASETS[repo][file]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Hub.requests.clear()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    with serving(Hub) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield address


def outputs(path, revision="main"):
    return [row.fields["output"] for row in read_rows(path, revision)]


def test_the_train_file_is_taken(hub, capfd):
    assert outputs("owner/clear") == ["a"]
    assert read_rows("owner/clear", SHA)[0].where == "owner/clear:train.jsonl, line 1"
    assert outputs("owner/packed") == ["p"]
    assert any(TOKEN in authorization for _, authorization in Hub.requests)  # so that not printing it means something
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_named_file(hub):
    assert outputs("owner/clear:test.jsonl") == ["b"]
    assert outputs("owner/several:harmless/train.jsonl") == ["x"]


def test_sets_known_by_name(hub, monkeypatch, tmp_path):
    monkeypatch.setitem(KNOWN_SETS, "both", KnownSet(("owner/several:helpful/train.jsonl", "owner/clear"), "x", 1, 2))
    assert outputs("both") == ["h", "a"]
    with pytest.raises(InputError, match=r"flan-v2 is not on the hub in its owners' form: give the \.tsv files"):
        outputs("flan-v2")
    with pytest.raises(InputError, match="alpacca: no such file.*; data sets known by name: oasst1, hh-rlhf, alpaca"):
        outputs("alpacca")
    (tmp_path / "both").write_text("")
    with pytest.raises(InputError, match="both: unknown kind of file"):  # a local file goes first
        outputs("both")


def test_known_sets_can_be_read():
    assert {known.format for known in KNOWN_SETS.values()} <= set(FORMATS)
    assert all(looks_like_dataset(path) for known in KNOWN_SETS.values() for path in known.paths)


def test_fetched_data_is_read_again_without_the_hub(hub, monkeypatch):
    assert outputs("owner/clear") == ["a"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert outputs("owner/clear") == ["a"]
    assert outputs("owner/clear:train.jsonl") == ["a"]
    with pytest.raises(InputError, match="the hub cannot be reached"):
        read_rows("owner/packed")


def test_an_old_copy_does_not_stand_in_where_the_hub_says_no(hub, monkeypatch):
    assert outputs("owner/clear") == ["a"]
    monkeypatch.delitem(DATASETS, "owner/clear")
    with pytest.raises(InputError, match="no data set of that name on the hub"):
        read_rows("owner/clear")


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("owner/several", "main", r"several data files: harmless/train.jsonl, helpful/train.jsonl; pick one as owner/"),
        ("owner/nothing", "main", "owner/nothing: no local file, and no data set of that name on the hub"),
        ("owner/clear", "v9", "owner/clear: has no revision 'v9'"),
        ("owner/clear:nope.jsonl", "main", "owner/clear:nope.jsonl: no such file in the data set"),
        ("owner/clear:README.md", "main", "owner/clear:README.md: unknown kind of file"),
        ("owner/gated", "main", "owner/gated: its owner grants access on request"),
        ("owner/closed", "main", "owner/closed: the hub answered with HTTP status 500"),
        ("owner/broken", "main", "owner/broken:train.jsonl, line 2: not valid JSON"),
        ("owner/a..b--c", "main", "not a valid name of a hub data set"),
    ],
)
def test_errors(hub, path, revision, message):
    with pytest.raises(InputError, match=message) as caught:
        read_rows(path, revision)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None or TOKEN not in str(caught.value.__cause__)


def choose(*names):
    return choose_train_files("o/n", list(names), SUFFIXES)


def test_choice_of_files():
    shards = [f"data/train-{i:05}-of-00003-{hex(i)}.parquet" for i in range(3)]
    assert choose("data/test-00000-of-00001.parquet", *reversed(shards), "README.md") == shards
    assert choose("only.csv", ".hidden/x.json", "dataset_infos.json") == ["only.csv"]
    assert choose("best_replies_train.jsonl", "best_replies_eval.jsonl") == ["best_replies_train.jsonl"]
    assert choose("train/a.json", "trainer_state.json") == ["train/a.json"]
    with pytest.raises(InputError, match="2 of the 3 shards"):
        choose(*shards[:2])
    with pytest.raises(InputError, match=r"several data files: a.json, b.json; pick one as o/n:a.json"):
        choose("a.json", "b.json")
    with pytest.raises(InputError, match="its files: weights.bin"):
        choose("weights.bin")


def test_names():
    assert looks_like_dataset("tatsu-lab/alpaca") and looks_like_dataset("a/b:dir/f.json")
    assert not any(map(looks_like_dataset, ["./a/b", "/a/b", "a", "a/b/c", "~/a", "../a", "a/b:"]))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("alpaca", "alpaca"),
        ("guanaco", "oasst1"),
        ("hh_rlhf", "hh-rlhf"),
        ("self_instruct", "self-instruct"),
        ("unnatural", "unnatural-instructions"),
        ("flan_v2", "flan-v2"),
        ("chip2", "chip2"),
        ("longform", "longform"),
    ],
)
def test_the_configs_of_the_known_sets(file, name):
    data = importlib.import_module(f"configs.{file}").get_config().data
    known = KNOWN_SETS[name]
    assert data.format == known.format
    # rows are whole, but for the paper's Guanaco
    lengths = (known.max_source_len, known.max_target_len) if name == "oasst1" else (0, 0)
    assert (data.max_source_len, data.max_target_len) == lengths
