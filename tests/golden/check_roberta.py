"""Lets PEFT and transformers read what a run of an encoder wrote, and compares logits.

    python tests/golden/check_roberta.py adapter BASE ADAPTER ROWS.npz
    python tests/golden/check_roberta.py merged MERGED ROWS.npz

ROWS.npz: tokens int32 [B, T], lengths int32 [B], logits float32 [B, labels] as qlora_jax has them in float32, with the
adapter on BASE unquantized, or of the merged folder. tests/train/test_encoders.py makes such files where
QLORA_JAX_ROBERTA_ROWS names a folder.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from transformers import RobertaForSequenceClassification


@torch.no_grad()
def main() -> None:
    kind, *names, file = sys.argv[1:]
    rows = np.load(file)
    lengths = torch.tensor(rows["lengths"])
    base, info = RobertaForSequenceClassification.from_pretrained(
        names[0], num_labels=rows["logits"].shape[1], dtype=torch.float32, attn_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    if kind == "adapter":
        assert PeftConfig.from_pretrained(names[1]).task_type == "SEQ_CLS"
        model = PeftModel.from_pretrained(base, Path(names[1]))
    else:
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        model = base
    within = np.arange(rows["tokens"].shape[1]) < rows["lengths"][:, None]
    tokens = np.where(within, rows["tokens"], base.config.pad_token_id)
    logits = model.eval()(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.arange(tokens.shape[1])[None] < lengths[:, None],
    ).logits.numpy()
    worst = float(np.abs(logits - rows["logits"]).max())
    print(f"{kind}: the largest difference of {logits.size} logits of size {np.abs(logits).max():.2f} is {worst:.1e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
