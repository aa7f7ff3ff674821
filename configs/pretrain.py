"""Makes the embedded model of the quickstart again: a Llama of 2.6 million parameters, 42 minutes on 2 busy cores.

python -m experiments.pretrain --config=configs/pretrain.py --out=/tmp/tiny_llama
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.steps = 3000
    c.batch_size = 16  # rows
    c.learning_rate = 3e-3  # at the end of the warm-up; falls as a cosine to 5 percent
    c.warmup_steps = 100
    c.weight_decay = 0.1  # on matrices
    c.seed = 0
    c.save_every = 250  # steps
    c.context = 128  # tokens a row

    c.D = 192  # model width
    c.F = 512  # feed-forward width
    c.L = 6  # layers
    c.N = 6  # query heads
    c.K = 3  # key/value heads
    c.H = 32  # head width
    return c.lock()
