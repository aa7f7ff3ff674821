"""Files: Hugging Face checkpoints in and out, PEFT adapters, orbax checkpoints of a run."""
