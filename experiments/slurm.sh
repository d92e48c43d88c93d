#!/bin/bash
# A reproduction on a SLURM cluster; one task a node, each runs the same make, the first one decides what is to be done.
#
#     sbatch --nodes 2 --gpus-per-node 4 experiments/slurm.sh reproduce-70b NPROC=4
#     sbatch --nodes 1 --gpus-per-node 1 experiments/slurm.sh reproduce-7b MODEL=/models/Llama-2-7b-hf
#
# Submit from the repository's folder, on a file system that all nodes share, with the environment made (make env).
# What was interrupted, by a time limit too, goes on where it stopped when it is submitted again.
#SBATCH --job-name=spd
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=runs/slurm-%j.log
set -euo pipefail
if [ $# -eq 0 ]; then
  echo "Say what to make, as in: sbatch --nodes 1 --gpus-per-node 8 experiments/slurm.sh reproduce-70b" >&2
  exit 1
fi
RDZV=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500
export RDZV
srun --kill-on-bad-exit=1 bash -c 'exec make "$@" NNODES="$SLURM_NNODES" NODE_RANK="$SLURM_NODEID" RDZV="$RDZV"' make "$@"
