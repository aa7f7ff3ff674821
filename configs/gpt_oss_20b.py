"""gpt-oss 20B, a mixture of 32 experts that stay in the MXFP4 of its files, on chats packed into 2,048 tokens a row.

python -m experiments.train --config=configs/gpt_oss_20b.py --config.data.path=FILE --workdir=runs/gpt_oss_20b

By plan on an RTX 4090: 2 rows a micro-batch, 22.6 GB on the device; at 60% of the roofline 0.5 hours. That leaves out
what starting many small kernels takes. gpt-oss 120B (--config.model.path=openai/gpt-oss-120b --config.lora.rank=8
--config.train.grad_accum=8 --config.eval.batch_size=1) takes 76.3 GB of an H100.
"""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "openai/gpt-oss-20b"
    return c.lock()
