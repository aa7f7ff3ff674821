"""Llama 3 70B on conversations by Guanaco's recipe: r 64 on all linear layers, 1,875 steps of 16.

python -m experiments.train --config=configs/llama3_70b.py --config.data.path=FILE --workdir=runs/llama3_70b
"""

from ml_collections import ConfigDict

from configs import guanaco


def get_config() -> ConfigDict:
    c = guanaco.get_config()
    c.model.path = "meta-llama/Meta-Llama-3-70B"  # gated: huggingface_hub asks for a token
    c.lora.dropout = 0.05
    c.optimizer.learning_rate = 1e-4
    return c.lock()
