"""The paper's grid (QLoRA, Dettmers et al., 2023): every ablation and every model of its tables on MMLU.

python -m experiments.sweep --config=configs/sweeps/paper.py --gpu=h100 --dry_run
python -m experiments.sweep --config=configs/sweeps/paper.py --gpu=h100 --ray_address=auto --workdir=runs/paper

Axes and counts, each with 3 seeds; a run that several groups want is run once:

    data types            4 sizes * 2 sets * 6 types * 3 seeds                  = 144   Table 4
    data sets             4 sizes * 8 sets * 3                                  =  96   Table 5
    r, dropout, layers    6 ranks * 3 dropouts * 5 layers * 3, of 7B            = 270   appendix A.1
    layers                2 sizes * 2 types * 5 layers * 3                      =  60   Figure 2
    r                     2 sizes * 2 types * 6 ranks * 3                       =  72   Figure 4
    r by data type        6 types * 6 ranks * 3, of 7B                          = 108   Figure 4, in 4 bits
    learning rates        4 sizes * 2 sets * 7 rates * 3                        = 168   appendix B.2
    dropout               4 sizes * 2 sets * 3 dropouts * 3                     =  72   appendix B.2
    batch sizes           2 sizes * 2 sets * 3 batch sizes * 3                  =  36   appendix B.2
    source or target      2 sizes * 8 sets * 2 * 3                              =  96   Table 10
    amount of data        2 sizes * 8 sets * 3 amounts * 3                      = 144   Table 11
    GLUE                  8 tasks * 4 types * 3 seeds                           =  96   Table 3, RoBERTa-large
    T5                    5 sizes * 4 types * 3 seeds                           =  60   Table 3
                                                                        choices 1,422, points 1,182

Table 2 and Figure 3 (OPT, BLOOM, Pythia and LLaMA in several data types) finetune nothing: paper_types.py has them.
Every run holds out 100 examples, for the loss in the ledger; MMLU is `evaluate`'s, of the adapters that
--keep_adapters keeps.
"""

from ml_collections import ConfigDict

from configs import base, roberta_glue, t5_sni
from qlora_jax.settings import flatten
from qlora_jax.sweep.grid import Grid, axis, chain, fixed, group, product

# hub name, learning rate, dropout: the paper's for each size (section 2 of the recipe, appendix B.2)
SIZES = {
    "7B": ("huggyllama/llama-7b", 2e-4, 0.1),
    "13B": ("huggyllama/llama-13b", 2e-4, 0.1),
    "33B": ("huggyllama/llama-30b", 1e-4, 0.05),
    "65B": ("huggyllama/llama-65b", 1e-4, 0.05),
}
# data.path, data.format, tokens of source and target. The last two are copies that others keep on the hub (a converted
# branch, and one template of the chain-of-thought part): their owners have none there in a form of rows
SETS = {
    "OASST1": ("oasst1", "oasst1", 16, 512),
    "HH-RLHF": ("hh-rlhf", "hh-rlhf", 16, 768),
    "Alpaca": ("alpaca", "alpaca", 384, 128),
    "Unnatural Instructions": ("unnatural-instructions", "unnatural-instructions", 384, 128),
    "Chip2": ("chip2", "chip2", 384, 128),
    "LongForm": ("longform", "longform", 512, 1024),
    "Self-Instruct": ("yizhongw/self_instruct:self_instruct/train/0000.parquet", "self-instruct", 384, 128),
    "FLAN v2": ("SirNeural/flan_v2:cot_zs_noopt_train.jsonl.gz", "flan-v2", 384, 256),
}
REVISIONS = {"Self-Instruct": "refs/convert/parquet"}
TYPES = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int4", False), ("none", False)]  # format, DQ
TABLE_3_TYPES = [("none", False), ("int8", False), ("fp4", False), ("nf4", True)]  # format, DQ
RANKS = [8, 16, 32, 64, 128, 256]
DROPOUTS = [0.0, 0.05, 0.1]
LAYERS = [
    ("q_proj", "k_proj"),  # key and query
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # all of attention
    ("gate_proj", "up_proj", "down_proj"),  # all of the FFN
    ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),  # attention and the FFN's output
    ("all-linear",),
]
RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3]
BATCHES = [16, 32, 64]  # sequences a step
AMOUNTS = [1_000, 3_000, 9_000]  # examples; OASST1 has about 10,000
# hub name, r: the paper's for each size (appendix on Super-NaturalInstructions)
T5_SIZES = {
    "80M": ("google/t5-small-lm-adapt", 16),
    "250M": ("google/t5-base-lm-adapt", 16),
    "780M": ("google/t5-large-lm-adapt", 16),
    "3B": ("google/t5-xl-lm-adapt", 64),
    "11B": ("google/t5-xxl-lm-adapt", 64),
}
BOTH, SMALL = ("Alpaca", "FLAN v2"), ("7B", "13B")


def get_config() -> ConfigDict:
    """The recipe; what a size, a set or an axis changes is in sweep()."""
    c = base.get_config()
    c.model.path = "huggyllama/llama-7b"
    c.data.path = "alpaca"
    c.data.max_source_len, c.data.max_target_len = 384, 128  # tokens, of SETS
    c.optimizer.paging = "auto"  # packs keep the optimizer's state on the device
    c.train.checkpoint_every = 500  # steps
    return c.lock()


def sizes(names: tuple[str, ...] = tuple(SIZES), without: str = "") -> Grid:
    """The sizes with their learning rates and dropouts; `without` a key that is an axis of its own."""
    keys = ("model.path", "optimizer.learning_rate", "lora.dropout")
    settings = [dict(zip(keys, SIZES[name], strict=True)) for name in names]
    return chain(*(fixed({key: values[key] for key in keys if key != without}) for values in settings))


def sets(names: tuple[str, ...] = tuple(SETS)) -> Grid:
    keys = ("data.path", "data.format", "data.max_source_len", "data.max_target_len")
    return chain(
        *(
            fixed(dict(zip(keys, SETS[name], strict=True)) | {"data.revision": REVISIONS.get(name, "main")})
            for name in names
        )
    )


def types(formats: list[tuple[str, bool]]) -> Grid:
    return chain(*(fixed({"quant.format": name, "quant.double_quant": double}) for name, double in formats))


def t5_sizes() -> Grid:
    """The T5s of Table 3, each by configs/t5_sni.py; that recipe says what of it is the paper's."""
    recipe = flatten(t5_sni.get_config())
    data = ("path", "format", "max_source_len", "max_target_len")
    keys = [f"data.{key}" for key in data] + ["lora.alpha", "lora.dropout", "optimizer.learning_rate", "train.steps"]
    shared = {key: recipe[key] for key in keys}
    return chain(*(fixed(shared | {"model.path": path, "lora.rank": rank}) for path, rank in T5_SIZES.values()))


def sweep() -> Grid:
    seeds = axis("train.seed", [0, 1, 2])
    exact = types([("nf4", True), ("none", False)])  # QLoRA and 16-bit LoRA
    layers, ranks = axis("lora.targets", LAYERS), axis("lora.rank", RANKS)
    dropouts = axis("lora.dropout", DROPOUTS)
    return chain(
        group("Table 4: data types", product(sizes(), sets(BOTH), types(TYPES), seeds)),
        group("Table 5: data sets", product(sizes(), sets(), seeds)),
        group("Appendix A.1: r, dropout, layers", product(ranks, dropouts, layers, seeds)),
        group("Figure 2: layers", product(sizes(SMALL), exact, layers, seeds)),
        group("Figure 4: r", product(sizes(SMALL), exact, ranks, seeds)),
        group("Figure 4: r by data type", product(types(TYPES), ranks, seeds)),
        group(
            "Appendix B.2: learning rates",
            product(
                sizes(without="optimizer.learning_rate"), sets(BOTH), axis("optimizer.learning_rate", RATES), seeds
            ),
        ),
        group("Appendix B.2: dropout", product(sizes(without="lora.dropout"), sets(BOTH), dropouts, seeds)),
        group("Appendix B.2: batch sizes", product(sizes(SMALL), sets(BOTH), axis("train.batch_size", BATCHES), seeds)),
        group(
            "Table 10: source or target",
            product(sizes(SMALL), sets(), axis("data.train_on_source", [False, True]), seeds),
        ),
        group("Table 11: amount of data", product(sizes(SMALL), sets(), axis("data.max_examples", AMOUNTS), seeds)),
        group("Table 3: GLUE", product(glue(), types(TABLE_3_TYPES), seeds)),
        group("Table 3: T5", product(t5_sizes(), types(TABLE_3_TYPES), seeds)),
    )


def glue() -> Grid:
    """The eight tasks, of RoBERTa-large by its own recipe; evaluate --task=glue measures the adapters that are kept."""
    axes = ("train.seed", "quant.format", "quant.double_quant")
    own = {key: value for key, value in flatten(roberta_glue.get_config()).items() if key not in axes}
    return chain(*(fixed(own | roberta_glue.of_task(task)) for task in roberta_glue.TASKS))
