"""HH-RLHF as the paper's code reads it: of each pair the chosen conversation, all turns trained. Steps and batch are
base.py's. The name hh-rlhf stands for the owners' four training files.

Of harmless-base's test conversations 99.4% are whole at 768 tokens, 97.0% at 512 (Llama 2's tokenizer).

python -m experiments.train --config=configs/hh_rlhf.py --config.model.path=DIR
--config.data.path=hh-rlhf --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "hh-rlhf"  # chosen, rejected
    c.data.max_source_len = 16  # tokens; the source is BOS alone
    c.data.max_target_len = 768  # tokens; the whole conversation is the target
    c.eval.batch_size = 4  # sequences
    return c.lock()
