"""FLAN v2: files of chain of thought, or rows of the whole collection. Steps and batch are base.py's.

The answer stands at the end of the target, so rows are whole: cut at 256 tokens 0.5% of AQuA, GSM8K and StrategyQA
lose it, at 128 16.6% (Llama 2's tokenizer).

python -m experiments.train --config=configs/flan_v2.py --config.model.path=DIR
--config.data.path=FILE --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "flan-v2"  # question, answer, rationale between tabs; or inputs, targets
    return c.lock()
