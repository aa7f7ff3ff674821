"""One run.

checks (what no run can have) → setup (config → objects; spec and shapes: the same in sizes) → cut (into micro-batches)
→ loop → loss (chunked), backward (layer by layer), step (the gradient) → checkpoints, workdir, loggers; memory; mmlu
(asked on the way); pretrain.
"""
