"""MMLU: data (the owners' or the hub's files), subjects, prompts → accuracy."""
