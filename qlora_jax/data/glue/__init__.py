"""GLUE: rows with a label, for encoders (Wang et al., 2019).

tasks (columns, labels and metrics of each) → rows (of the owners' files and the hub's, as texts and a label) → examples
(tokens with the label at their end).
"""
