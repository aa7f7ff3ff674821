"""Optimizers: optax transformations, schedules, and state that is paged between host and device."""
