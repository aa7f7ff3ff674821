"""Self-Instruct. Steps and batch are base.py's.

Cut at Alpaca's 128 tokens, 18.5% of the answers of the owners' seed and user tasks would lose their end, at 256 4.9%
(Llama 2's tokenizer).

python -m experiments.train --config=configs/self_instruct.py --config.model.path=DIR
--config.data.path=FILE --workdir=RUN
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    c = base.get_config()
    c.data.format = "self-instruct"  # prompt, completion; or tasks: instruction, instances
    return c.lock()
