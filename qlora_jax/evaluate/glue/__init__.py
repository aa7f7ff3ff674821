"""GLUE: metrics → predict (an encoder's classes or numbers of rows) → score (of a task, and over tasks)."""
