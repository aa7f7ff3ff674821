"""The paper's axes on a model that a laptop trains: 1,004 adapters of a Llama of half a million parameters.

python -m experiments.sweep --config=configs/sweeps/mini.py --workdir=runs/mini
python -m experiments.report --workdir=runs/mini

Base: assets/mini_llama (configs/pretrain_mini.py); data: the quickstart's 1,500 instructions, 200 held out. A run is
100 steps of 8 sequences. Axes and counts (a run that several groups want is run once):

    data types          5 formats * 3 learning rates * 20 seeds                   = 300   Table 4, figure 3
    r and layers        6 ranks * 5 layers * 10 seeds                             = 300   figures 2 and 4
    learning rates      7 rates * 3 schedules * 6 seeds                           = 126   appendix B.2
    amount of data      5 amounts * 2 formats * 10 seeds                          = 100   Table 11
    dropout             3 dropouts * 3 ranks * 10 seeds                           =  90   appendix B.2
    alpha               5 alphas * 3 ranks * 6 seeds                              =  90   (the paper keeps it at 16)
    source or target    2 * 3 amounts * 12 seeds                                  =  72   Table 10
    block size          4 block sizes * 2 double quantization * 8 seeds           =  64   (the paper: 64 and yes)
                                                                          choices 1,142, points 1,004

Seeds set the adapter's initialisation, dropout and the order of the data alike.
"""

from ml_collections import ConfigDict

from configs import quickstart
from qlora_jax.sweep.grid import Grid, axis, chain, fixed, group, product, zipped

TYPES = [("none", False), ("nf4", True), ("nf4", False), ("fp4", False), ("int4", False)]  # format, double quantization
RANKS = [1, 2, 4, 8, 16, 32]
LAYERS = [
    ("q_proj", "k_proj"),  # key and query
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # all of attention
    ("gate_proj", "up_proj", "down_proj"),  # all of the FFN
    ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),  # attention and the FFN's output
    ("all-linear",),
]
RATES = [5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2]
ALPHAS = [1.0, 2.0, 4.0, 8.0, 16.0]
AMOUNTS = [100, 200, 400, 800, 0]  # instructions; 0 is all 1,500


def get_config() -> ConfigDict:
    """What a point has unless an axis says otherwise."""
    c = quickstart.get_config().unlock()
    c.model.path = "assets/mini_llama"
    c.lora.rank = 8
    c.lora.alpha = 8.0
    c.optimizer.learning_rate = 5e-3
    c.train.steps = 100
    c.train.batch_size = 8
    c.train.checkpoint_every = 100  # steps: a run takes seconds, a killed one begins anew
    c.train.log_every = 10  # steps
    c.eval.every = 0
    return c.lock()


def types(formats: list[tuple[str, bool]]) -> Grid:
    return chain(*(fixed({"quant.format": name, "quant.double_quant": double}) for name, double in formats))


def seeds(count: int) -> Grid:
    return zipped(axis("train.seed", range(count)), axis("data.seed", range(count)))


def sweep() -> Grid:
    rate = lambda *rates: axis("optimizer.learning_rate", rates)  # noqa: E731
    scaled = lambda rank: fixed({"lora.rank": rank, "lora.alpha": float(rank)})  # noqa: E731 (scale 1 at every rank)
    ranks = chain(*map(scaled, RANKS))
    exact = types([("nf4", True), ("none", False)])
    return chain(
        group("Data types", product(types(TYPES), rate(2e-3, 3e-3, 5e-3), seeds(20))),
        group("r and layers", product(ranks, axis("lora.targets", LAYERS), seeds(10))),
        group(
            "Learning rates",
            product(rate(*RATES), axis("optimizer.schedule", ["constant", "linear", "cosine"]), seeds(6)),
        ),
        group("Amount of data", product(axis("data.max_examples", AMOUNTS), exact, seeds(10))),
        group(
            "Dropout",
            product(axis("lora.dropout", [0.0, 0.05, 0.1]), chain(scaled(2), scaled(8), scaled(32)), seeds(10)),
        ),
        group(
            "Alpha", product(axis("lora.alpha", [1.0, 2.0, 4.0, 8.0, 16.0]), axis("lora.rank", [2, 8, 32]), seeds(6))
        ),
        group(
            "Source or target",
            product(axis("data.train_on_source", [False, True]), axis("data.max_examples", [200, 800, 0]), seeds(12)),
        ),
        group(
            "Block size",
            product(axis("quant.block_size", [32, 64, 128, 256]), axis("quant.double_quant", [False, True]), seeds(8)),
        ),
    )
