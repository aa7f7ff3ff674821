"""Makes the embedded model of the quickstart, from text that every Python has and generated material.

    python -m experiments.pretrain --out=runs/tiny_llama

--config names another recipe: configs/pretrain_mini.py makes the mini grid's model.
"""

import json
from pathlib import Path

from absl import flags
from tqdm import tqdm

from experiments.support import cli

CONFIG = cli.config_flag("configs/pretrain.py")
OUT = flags.DEFINE_string("out", None, "Folder to write the Hugging Face checkpoint to.", required=True)


def hf_config(config, vocab_size: int) -> dict:
    """config.json of the model that a pretraining config describes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.D,
        "intermediate_size": config.F,
        "num_hidden_layers": config.L,
        "num_attention_heads": config.N,
        "num_key_value_heads": config.K,
        "head_dim": config.H,
        "vocab_size": vocab_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def main() -> None:
    from experiments.support.embedded import packing, tokenizer
    from qlora_jax.train.pretrain import pretrain

    config = CONFIG.value
    rows, heldout = (
        packing.pretraining_rows(config.context, config.seed),
        packing.heldout_rows(config.context, config.seed),
    )
    print(f"pretraining on {rows.size:,} tokens in {len(rows)} rows; held out {heldout.size:,}")
    bar = tqdm(total=config.steps, unit="step")

    def report(metrics: dict) -> None:
        bar.update(metrics["step"] - bar.n)
        bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['tokens_per_second']:,.0f} tokens/s")

    out = Path(OUT.value)
    measured = pretrain(hf_config(config, tokenizer.load().get_vocab_size()), rows, heldout, config, out, report)
    bar.close()
    tokenizer.save(tokenizer.load(), out, config.context)
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    cli.run(main)
