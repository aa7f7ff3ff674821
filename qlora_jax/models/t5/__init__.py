"""T5: an encoder that reads the prompt, and a decoder that writes the answer: pair (names and sizes), config, rows,
positions, stacks, model."""
