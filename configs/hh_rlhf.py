"""HH-RLHF as the paper's code reads it: of each pair the chosen conversation, all turns trained. Steps and batch are
base.py's. The name hh-rlhf stands for the owners' four training files.

The source is BOS alone, the whole conversation is the target. Of harmless-base's test conversations 99.4% have at most
768 tokens, where the paper cuts, 97.0% at most 512 (Llama 2's tokenizer).

python -m experiments.train --config=configs/hh_rlhf.py --config.model.path=DIR
--config.data.path=hh-rlhf --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "hh-rlhf"  # chosen, rejected
    return c.lock()
