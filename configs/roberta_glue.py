"""RoBERTa-large on a task of GLUE with a 4-bit base: adapters on all linear layers, and a head that trains whole.

python -m experiments.train --config=configs/roberta_glue.py --workdir=runs/rte
python -m experiments.train --config=configs/roberta_glue.py --config.data.path=glue_data/CoLA/train.tsv \\
    --config.data.eval_path=glue_data/CoLA/dev.tsv --config.train.steps=5300 --workdir=runs/cola

The paper's Table 3 has the mean over eight tasks, of a 16-bit base, Int8, FP4 and NF4 with double quantization; that
adapters are on all layers is the paper's. It does not say the rest. Learning rate, warm-up of 6% of the steps, weight
decay, r and alpha are those of LoRA's authors for RoBERTa-large on QQP and STS-B (microsoft/LoRA, examples/NLU). Ours
are: 32 rows a step, 255 tokens a row, LoRA's dropout (the model's own dropout is not computed), and the steps: 20
passes over the small sets, 3 over QNLI, QQP, SST-2 and MNLI (TASKS).

By plan on an RTX 4090: 32 rows a micro-batch, 1.7 GB on the device.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base

HUB = "nyu-mll/glue"
# optimizer steps, and the names of the held-out sets
TASKS: dict[str, tuple[int, tuple[str, ...]]] = {
    "cola": (5_300, ("validation",)),
    "sst2": (6_300, ("validation",)),
    "mrpc": (2_300, ("validation",)),
    "qqp": (34_000, ("validation",)),
    "stsb": (3_600, ("validation",)),
    "mnli": (37_000, ("validation_matched", "validation_mismatched")),
    "qnli": (9_800, ("validation",)),
    "rte": (1_600, ("validation",)),
}


def of_task(name: str) -> dict[str, Any]:
    """The keys in which the tasks differ."""
    steps, heldout = TASKS[name]
    return {
        "data.path": f"{HUB}:{name}/train-*.parquet",
        "data.eval_path": ",".join(f"{HUB}:{name}/{part}-*.parquet" for part in heldout),
        "train.steps": steps,
        "optimizer.warmup_steps": steps * 6 // 100,
    }


def get_config() -> ConfigDict:
    c = base.get_config()
    c.model.path = "FacebookAI/roberta-large"
    c.lora.rank, c.lora.alpha = 8, 16.0
    c.data.format = "glue"
    c.data.max_source_len = 255  # tokens, <s> and </s> counted; the label makes 256 of them
    c.data.eval_examples = 0  # all of eval_path
    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule = "linear"
    c.optimizer.weight_decay = 0.1
    c.train.batch_size = 32  # rows a step
    c.train.grad_accum = 1
    c.train.checkpoint_every = 500  # steps
    c.eval.batch_size = 32  # rows
    c.update_from_flattened_dict(of_task("rte"))
    return c.lock()
