"""Optimizers: schedules (config → optax), pages (what may be cut), paged (movement), eightbit (8-bit moments)."""
