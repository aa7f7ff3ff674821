"""What the paper measures of models as they are, in several data types (QLoRA, Dettmers et al., 2023).

python -m experiments.evaluate_types --tables=configs/sweeps/paper_types.py --dry_run
python -m experiments.evaluate_types --tables=configs/sweeps/paper_types.py --only="Table 2" --text=pile_cc.txt \
    --workdir=runs/paper_types

    Table 2     20 models of 125M to 13B * 4 types          =  80   perplexity of the Pile's Common Crawl part
    Figure 3     4 LLaMAs of 7B to 65B * 3 types            =  12   mean accuracy of five tasks, zero-shot
    beside them  the same models in 16 bits and in int8     =  48   what a type costs, which the paper does not list
                                                   evaluations 140

Table 2 gives means over all models: Int4 34.34, FP4 (E2M1) 31.07, FP4 (E3M0) 29.48, NF4 + DQ 27.41. Which sizes of a
family the paper took it does not list: these are all that are released between 125M and 13B. Nor does it say which part
of the Pile's Common Crawl it took; --text is one file.
"""

from qlora_jax.evaluate.by_type import Table

LLAMA = ("huggyllama/llama-7b", "huggyllama/llama-13b", "huggyllama/llama-30b", "huggyllama/llama-65b")
OPT = tuple(f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b"))
BLOOM = tuple(f"bigscience/bloom-{size}" for size in ("560m", "1b1", "1b7", "3b", "7b1"))
PYTHIA = tuple(f"EleutherAI/pythia-{size}" for size in ("160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"))
UP_TO_13B = (*OPT, *BLOOM, *LLAMA[:2], *PYTHIA)
PERPLEXITY = ("--task=perplexity",)
ZERO_SHOT = ("--task=lm-eval", "--tasks=winogrande,hellaswag,piqa,arc_easy,arc_challenge", "--num_fewshot=0")


def tables() -> tuple[Table, ...]:
    return (
        Table("Table 2: perplexity by data type", UP_TO_13B, ("int4", "fp4", "fp4-e3m0", "nf4+dq"), PERPLEXITY),
        Table("Figure 3: zero-shot accuracy by data type", LLAMA, ("fp4", "nf4", "nf4+dq"), ZERO_SHOT),
        Table("Perplexity in 16 and 8 bits", UP_TO_13B, ("none", "int8"), PERPLEXITY),
        Table("Zero-shot accuracy in 16 and 8 bits", LLAMA, ("none", "int8"), ZERO_SHOT),
    )
