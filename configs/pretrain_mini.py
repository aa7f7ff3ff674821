"""Makes the base of the mini grid again (assets/mini_llama): a Llama of 504,672 parameters, the quickstart's smaller
sibling on the same text and tokenizer.

python -m experiments.pretrain --config=configs/pretrain_mini.py --out=/tmp/mini_llama
"""

from ml_collections import ConfigDict

from configs import pretrain


def get_config() -> ConfigDict:
    c = pretrain.get_config().unlock()
    c.steps = 4000
    c.learning_rate = 4e-3

    c.D = 96
    c.F = 256
    c.L = 4
    c.N = 4
    c.K = 2
    c.H = 24
    return c.lock()
