"""Will it fit, how fast: a config's programs compiled for a GPU that is not here.

gpus (cards; here: this machine's) → topology (a described device) → program (what is compiled) → memory (allocator:
what a card takes beside it), roofline → plan, pack, longest, advice; buffers (XLA's report), kernels (launches
a layer); utilization.
"""
