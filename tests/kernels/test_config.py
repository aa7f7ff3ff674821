"""Choice of tiles: heuristic, candidates, tuned tables and their mistakes."""

import dataclasses
import json
import logging

import pytest

from pallas_kernels.nf4_matmul import config
from pallas_kernels.nf4_matmul.shapes import MODELS, SHAPES, Shape

A100 = config.Gpu("NVIDIA A100-SXM4-80GB", 80, 108)
RTX_4090 = config.Gpu("NVIDIA GeForce RTX 4090", 89, 128)
SHAPE = Shape(4096, 4096)


def test_shapes_of_known_models():
    assert SHAPES["llama-7b/down"] == (4096, 11008)
    assert SHAPES["llama-70b/key_value"] == (1024, 8192)
    # the parameters of Llama-65B's 80 layers: four attention projections, gate and up, down
    layers = MODELS["llama-65b"]
    weights = {name: o * i for name, (o, i) in layers.items()}
    assert 80 * (4 * weights["attention"] + 2 * weights["gate_up"] + weights["down"]) == pytest.approx(
        64.76e9, rel=1e-3
    )
    assert all(o % 2 == 0 and i % 64 == 0 for o, i in SHAPES.values())


@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
def test_heuristic_tiles_are_possible(block_size):
    for shape in [*SHAPES.values(), Shape(64, 64)]:
        tiles = config.heuristic(shape, block_size, RTX_4090)
        assert block_size % tiles.block_i == 0
        assert 1 <= tiles.split <= shape.in_features // tiles.block_i
        assert config.shared_bytes(tiles) <= config.shared_limit(89)


def test_programs_fill_the_gpu():
    tiles = config.heuristic(SHAPE, 64, A100)
    assert config.programs(SHAPE, tiles) * tiles.num_warps >= 8 * A100.cores


@pytest.mark.parametrize(
    ("op", "rows", "is_few"), [("forward", 16, True), ("forward", 17, False), ("backward", 1, False)]
)
def test_few_rows_are_forward_products_of_up_to_16(op, rows, is_few):
    assert config.is_few(op, rows) == is_few


@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_variations_fit_differ_and_are_few(block_size):
    base, tried = config.heuristic(SHAPE, block_size, RTX_4090), set()
    for fields in config.SWEEPS:
        found = config.variations(SHAPE, block_size, RTX_4090, base, fields)
        assert 1 < len(found) == len(set(found)) <= 15
        for tiles in found:
            assert config.shared_bytes(tiles) <= config.shared_limit(89)
            assert block_size % tiles.block_i == 0
            assert dataclasses.replace(tiles, **{field: getattr(base, field) for field in fields}) == base
        tried |= set(found)
    assert 5 < len(tried) <= 40


def test_a_tuned_table_comes_back_and_is_used(tmp_path, monkeypatch):
    tiles = dataclasses.replace(config.heuristic(SHAPE, 64, A100), num_stages=2)
    table: config.Table = {
        ("forward", SHAPE, 64, 16): config.Choice("triton", tiles),
        ("forward", SHAPE, 64, 4): config.Choice("scratch"),
    }
    monkeypatch.setattr(config, "TUNED", tmp_path)
    config.write_table(config.table_file(A100.name), A100.name, table)
    config.forget_tables()
    try:
        assert config.read_table(tmp_path / "nvidia-a100-sxm4-80gb.json") == table
        assert config.choose(9, SHAPE, 64, A100) == tiles
        untuned = config.heuristic(SHAPE, 64, A100)
        assert config.choose(8, SHAPE, 64, A100) == untuned != tiles
        assert config.choose(3, SHAPE, 64, A100) == untuned  # scratch won there, and has no tiles
        assert config.is_tuned(A100.name, "forward", SHAPE, 64)
        assert not config.is_tuned(A100.name, "backward", SHAPE, 64)
        assert [path.name for path in tmp_path.iterdir()] == ["nvidia-a100-sxm4-80gb.json"]  # nothing half-written
    finally:
        config.forget_tables()


def test_entries_of_kernels_that_are_gone_are_left_out_and_said(tmp_path, caplog):
    """A table that was tuned before: Triton at training rows and backward, and tiles of the old kernel."""
    old = {"block_m": 16, "block_o": 64, "block_i": 64, "split": 1, "group_m": 8, "num_warps": 4, "num_stages": 4}
    entries = [
        GOOD,
        {**GOOD, "rows": 1, "tiles": old | {"scale_sums": True, "scales_in_kernel": True}},
        {**GOOD, "rows": 2048, "tiles": old},
        {**GOOD, "op": "backward", "tiles": old},
        {**{key: value for key, value in GOOD.items() if key != "tiles"}, "rows": 1024, "backend": "mosaic"},
    ]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"entries": entries}))
    with caplog.at_level(logging.WARNING):
        table = config.read_table(path)
    assert [(op, rows, choice.backend) for (op, _, _, rows), choice in table.items()] == [
        ("forward", 16, "triton"), ("forward", 1024, "mosaic"),
    ]  # fmt: skip
    said = f"{path}: 3 entries are left out: they name Triton kernels that are gone; tune again"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_an_untuned_gpu_is_said_once(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(config, "TUNED", tmp_path)
    unknown = A100._replace(name="NVIDIA Test")
    with caplog.at_level(logging.WARNING):
        for rows in (1, 2, 16):
            config.choose(rows, SHAPE, 64, unknown)
    assert [record.getMessage() for record in caplog.records] == [
        "nf4_matmul: there is no tuned table of NVIDIA Test; tiles come from a heuristic "
        "(python -m experiments.bench_kernels --tune measures better ones)"
    ]


GOOD = {
    "op": "forward",
    "out_features": 4096,
    "in_features": 4096,
    "block_size": 64,
    "rows": 16,
    "backend": "triton",
    "tiles": dataclasses.asdict(config.Tiles(64, 64, 1, 4, 4)),
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", 'no JSON object with "entries"'),
        ("[]", 'no JSON object with "entries"'),
        (
            json.dumps({"entries": [GOOD, {**GOOD, "op": "up"}]}),
            "entry 1: op is 'up', expected one of forward, backward",
        ),
        (json.dumps({"entries": [{k: v for k, v in GOOD.items() if k != "rows"}]}), "entry 0: 'rows' is missing"),
        (json.dumps({"entries": [{**GOOD, "rows": 0}]}), "entry 0: rows is 0, expected a power of two"),
        (json.dumps({"entries": [{k: v for k, v in GOOD.items() if k != "backend"}]}), "0: 'backend' is missing"),
        (json.dumps({"entries": [{**GOOD, "backend": "cuda"}]}), "backend is 'cuda', expected one of xla, triton, scr"),
        (json.dumps({"entries": [{**GOOD, "backend": "scratch"}]}), "tiles beside backend 'scratch', expected them"),
        (json.dumps({"entries": [{k: v for k, v in GOOD.items() if k != "tiles"}]}), "entry 0: 'tiles' is missing"),
        (json.dumps({"entries": [{**GOOD, "rows": 17}]}), "entry 0: rows is 17, expected a power of two"),
        (json.dumps({"entries": [{**GOOD, "block_size": 32}]}), "block_i is 64, expected a divisor of block_size 32"),
        (json.dumps({"entries": [{**GOOD, "tiles": {**GOOD["tiles"], "block_o": 24}}]}), "block_o is 24, expected a"),
        (json.dumps({"entries": [{**GOOD, "tiles": {"block_k": 1}}]}), "unexpected keyword argument 'block_k'"),
        (json.dumps({"entries": [GOOD, GOOD]}), "entry 1: .* stands there twice"),
    ],
)
def test_mistakes_in_a_tuned_table_are_named(tmp_path, text, message):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        config.read_table(path)
    assert str(path) in str(error.value)


def test_committed_tables_can_be_read():
    for path in config.TUNED.glob("*.json"):
        assert config.read_table(path)
