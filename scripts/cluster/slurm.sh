#!/bin/bash
# A sweep on SLURM: brings up Ray on the job's nodes, runs the sweep on it, and takes it down with the job.
#
#   sbatch --nodes=4 --gpus-per-node=8 scripts/cluster/slurm.sh --config=configs/sweeps/paper.py --gpu=h100
#
# Submit from the repository's folder, with .venv made there (with '.[cuda13,sweep]'), on a disk that all nodes see.
# Submitted again after the time limit, the sweep goes on: its ledger is in $WORKDIR.
#SBATCH --job-name=qlora-sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=sweep-%j.log
set -euo pipefail

# The ledger belongs on a disk of the first node, not on a network file system: SQLite's write-ahead log needs one
# machine's memory. It is copied back and forth, because the next job's first node may be another.
WORKDIR=${WORKDIR:-runs/sweep}                    # kept, on the shared disk
LOCAL=${SLURM_TMPDIR:-/tmp}/sweep-$SLURM_JOB_ID   # on the first node
PORT=${RAY_PORT:-6379}
PYTHON=.venv/bin/python

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')

# one `ray start --block` a node; srun ends them with the job. Ray finds GPUs by itself
start=(.venv/bin/ray start --block --disable-usage-stats --num-cpus="$SLURM_CPUS_PER_TASK")
srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
  "${start[@]}" --head --node-ip-address="$head" --port="$PORT" --include-dashboard=false &
sleep 15
if ((${#nodes[@]} > 1)); then
  others=$(IFS=,; echo "${nodes[*]:1}")
  srun --overlap --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --nodelist="$others" \
    "${start[@]}" --address="$head:$PORT" &
fi

mkdir -p "$WORKDIR" "$LOCAL"
cp -a "$WORKDIR"/ledger.sqlite* "$LOCAL/" 2>/dev/null || true # there is none the first time
keep() { cp -a "$LOCAL"/ledger.sqlite* "$WORKDIR/" 2>/dev/null || true; }
trap 'kill -TERM "$sweep"; wait "$sweep"; keep; exit 143' TERM

# this script runs on the first node: the driver is here, and its packs go to every GPU of the job
"$PYTHON" -m experiments.sweep --ray_address="$head:$PORT" --workdir="$LOCAL" --packs="$WORKDIR/packs" "$@" &
sweep=$!
status=0
wait "$sweep" || status=$?
keep
exit "$status"
