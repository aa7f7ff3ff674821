"""Grids: how they combine, what their points are, and mistakes in one line."""

import pytest

from configs import quickstart
from qlora_jax.errors import InputError
from qlora_jax.settings import config_hash, resolved
from qlora_jax.sweep.cost import pack_bytes
from qlora_jax.sweep.grid import axis, chain, expand, fixed, group, product, when, zipped
from qlora_jax.sweep.packs import make_packs, missing
from qlora_jax.train import spec


@pytest.fixture
def config():
    return quickstart.get_config()


def values(grid) -> list[dict]:
    return [dict(choice.values) for choice in grid]


def test_grids_combine():
    ranks, seeds = axis("lora.rank", [4, 8]), axis("train.seed", [0, 1])
    both = values(product(ranks, seeds))
    assert both == [{"lora.rank": r, "train.seed": s} for r in (4, 8) for s in (0, 1)]
    assert values(zipped(ranks, seeds)) == [{"lora.rank": 4, "train.seed": 0}, {"lora.rank": 8, "train.seed": 1}]
    assert values(chain(ranks, seeds)) == values(ranks) + values(seeds)
    assert values(when(lambda v: v["lora.rank"] > v["train.seed"] + 3, product(ranks, seeds))) == [both[0], *both[2:]]
    assert values(fixed({"lora.rank": 4, "train.seed": 1})) == [{"lora.rank": 4, "train.seed": 1}]


def test_points_are_resolved_configs(config):
    points = expand(config, axis("lora.rank", [4, 8])).points
    for point, rank in zip(points, (4, 8), strict=True):
        config.lora.rank = rank
        assert point.config == resolved(config) and point.hash == config_hash(point.config)
        assert point.axes == {"lora.rank": rank}


def test_values_become_what_the_config_has(config):
    written = chain(axis("lora.alpha", [8, 8.0]), axis("lora.targets", [("q_proj",), ["q_proj"]]))
    points = expand(config, written).points
    assert len(points) == 2
    assert points[0].config["lora"]["alpha"] == 8.0 and points[1].config["lora"]["targets"] == ["q_proj"]


def test_equal_configs_are_one_point_of_several_groups(config):
    grid = chain(
        group("rank", product(axis("lora.rank", [4, 16]), axis("train.seed", [0, 1]))),
        group("seed", axis("train.seed", [0, 1, 2])),  # rank 16 is the config's own
    )
    points = expand(config, grid)
    assert len(points) == 5 and points.choices == 7
    shared = [point for point in points.points if point.groups == ("rank", "seed")]
    assert [point.axes for point in shared] == [{"lora.rank": 16, "train.seed": seed} for seed in (0, 1)]
    assert points.groups == {"rank": {"lora.rank": [4, 16], "train.seed": [0, 1]}, "seed": {"train.seed": [0, 1, 2]}}
    assert points.statement() == [
        "rank: 4 points; lora.rank (2), train.seed (2)",
        "seed: 3 points; train.seed (3)",
        "in all 5 points (2 of 7 choices come to the same config as another)",
    ]


@pytest.mark.parametrize(
    "grid, words",
    [
        (lambda: axis("lora.rnak", [1]), "lora.rnak.*did you mean lora.rank"),
        (lambda: axis("rank", [1]), "did you mean lora.rank"),
        (lambda: axis("lora.rank", ["8"]), "lora.rank = '8' is a str; expected a int"),
        (lambda: axis("lora.rank", [True]), "lora.rank = True is a bool"),
        (lambda: axis("lora.targets", ["q_proj"]), "lora.targets = 'q_proj' is a str; expected a tuple"),
        (lambda: axis("lora.rank", []), "empty grid"),
        (lambda: [{"lora.rank": 8}], r"sweep\(\) must return a grid"),
        (lambda: product(axis("lora.rank", [1]), axis("lora.rank", [2])), "lora.rank is set by two"),
        (lambda: zipped(axis("lora.rank", [1]), axis("train.seed", [1, 2])), "grids of 1, 2 choices"),
        (lambda: when(lambda v: v["train.seed"], axis("lora.rank", [1])), "asks for 'train.seed'.*sets lora.rank"),
    ],
)
def test_mistakes_are_one_line(config, grid, words):
    with pytest.raises(InputError, match=words):
        expand(config, grid())


def test_ten_thousand_points(config):
    grid = product(
        axis("quant.format", ["nf4", "fp4", "int4", "none"]),
        axis("lora.rank", [2, 4, 8, 16, 32]),
        axis("optimizer.learning_rate", [n * 1e-4 for n in range(1, 21)]),
        axis("lora.dropout", [0.0, 0.1, 0.2, 0.3, 0.4]),
        axis("train.seed", range(5)),
    )
    points = expand(config, group("all", grid)).points
    packs = make_packs(points, lambda plain: plain["quant"]["format"], 16, pack_bytes, 10**9)
    assert len(points) == 10_000 and sum(len(pack.points) for pack in packs) == 10_000


def test_packs_have_one_key_and_fit(config):
    points = expand(config, product(axis("quant.format", ["nf4", "fp4"]), axis("lora.rank", [8, 4, 8, 2, 6]))).points
    packs = make_packs(points, lambda plain: plain["quant"]["format"], 3, lambda some: len(some), 2)
    assert [len(pack.points) for pack in packs] == [2, 2, 2, 2]
    assert all(len({point.config["quant"]["format"] for point in pack.points}) == 1 for pack in packs)
    ranks = [point.config["lora"]["rank"] for pack in packs[:2] for point in pack.points]
    assert sorted(ranks) == [2, 4, 6, 8]
    alone = make_packs(points, lambda plain: "", 4, lambda some: 10, 1)
    assert all(len(pack.points) == 1 for pack in alone)


def test_what_is_missing_of_a_pack_is_what_it_was(config):
    points = expand(config, axis("train.seed", range(10))).points
    packs = make_packs(points, lambda plain: "", 4)
    done = {point.hash: "done" for point in packs[1].points}
    assert [pack.name for pack in missing(packs, done)] == [packs[0].name, packs[2].name]
    halves = packs[0].halves()
    assert [len(half.points) for half in halves] == [2, 2]
    left = missing(packs, {digest: "done" for digest in halves[0].hashes})
    assert left[0].name == halves[1].name


def test_rows_as_long_as_the_data_are_read_once(config, monkeypatch):
    """A grid over a data set whose lengths the config does not give takes what one with the found length takes."""
    read = []
    longest = spec.longest_example
    monkeypatch.setattr(spec, "longest_example", lambda *a: read.append(a) or longest(*a))
    grid = product(axis("lora.rank", [4, 8]), axis("train.seed", range(4)), axis("data.seed", [0, 1]))
    config.data.max_source_len = config.data.max_target_len = 0
    whole = expand(config, grid).points
    taken = pack_bytes(whole)
    assert len(read) == 1
    T = spec.read_spec(config).batch.T
    config.data.max_source_len, config.data.max_target_len = T - 10, 10
    assert taken == pack_bytes(expand(config, grid).points)
    config.data.max_source_len, config.data.max_target_len = T - 10, 266
    assert taken < pack_bytes(expand(config, grid).points)
    config.data.max_source_len = config.data.max_target_len = 0
    config.data.path = "owner/name"
    with pytest.raises(InputError, match="owner/name is no file on this machine; give both lengths"):
        pack_bytes(expand(config, grid).points)


def test_packs_predict_memory(config):
    points = expand(config, product(axis("lora.rank", [4, 8]), axis("train.seed", range(4)))).points
    small, large = points[:4], points[4:]
    assert pack_bytes(small[:1]) < pack_bytes(small) < pack_bytes(large)
    assert pack_bytes([small[0], large[0]]) == pack_bytes([large[0], large[1]])  # at the largest rank
