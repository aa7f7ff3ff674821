"""What this machine has for training, and what it lacks: for installs that may be broken.

machine (system, memory, disk, nvidia-smi) and packages (what is installed) need the standard library alone. devices
(JAX's devices, which kernels `auto` takes) asks a process of its own (probe), which may crash or hang. findings says
what follows, and text shows it.
"""
