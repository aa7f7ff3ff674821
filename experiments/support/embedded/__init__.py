"""The quickstart's own material: a pretraining corpus, a tokenizer and an instruction set."""
