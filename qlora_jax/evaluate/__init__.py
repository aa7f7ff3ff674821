"""What a model can do.

scoring (logits where they are wanted) → perplexity, mmlu/, harness (lm-eval), answer_record; exact_match. judge/
makes verdicts, tournament/ counts them. shares (intervals), tables.
"""
