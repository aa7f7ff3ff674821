"""A model in five lines of Python, and what commands share with it.

names (short names of a config's keys), opening (a model, its tokenizer and its adapter from folders), recipe (what a
run takes where nothing was said), folders (where a run goes), rows (data that is in memory), prompts (how an adapter is
asked), model (load, generate, chat, save), plot, finetune, plan.
"""
