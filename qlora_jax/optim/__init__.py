"""Optimizers: schedules (config → optax), pages (what may be cut), residency (what of it stays on the device), paged
(movement), eightbit (8-bit moments)."""
