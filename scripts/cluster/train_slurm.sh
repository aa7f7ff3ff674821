#!/bin/bash
# One model on all GPUs of a SLURM job: one process a node, which meet by themselves.
#
#   sbatch --nodes=2 --gpus-per-node=8 scripts/cluster/train_slurm.sh --config=configs/llama3_70b.py \
#     --config.data.path=FILE --config.mesh.devices=16 --workdir=runs/llama3_70b
#
# Submit from the repository's folder, with .venv made there (with '.[cuda13]'), on a disk that all nodes see.
# Shortly before the time limit the run saves on all nodes and ends; submitted again, it goes on, on as many as there are.
#SBATCH --job-name=qlora-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=train-%j.log
set -euo pipefail

# without --kill-on-bad-exit the others would look for a lost one for as long as a heartbeat
exec srun --kill-on-bad-exit=1 .venv/bin/python -m experiments.train --cluster "$@"
