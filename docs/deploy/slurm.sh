#!/usr/bin/env bash
# One model over two machines: sbatch slurm.sh Qwen/Qwen3-8B
#
# cluster.key is on a file system that all machines see: octavo cluster-key cluster.key
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --no-kill
set -euo pipefail
model=${1:?usage: sbatch slurm.sh MODEL}

# A task that fails must not end the others: --no-kill and --kill-on-bad-exit=0. Whatever ends is started again, until the
# server on the first machine ends as it should (0), or cannot be started as configured (2 or 78).
srun --no-kill --kill-on-bad-exit=0 bash -c '
    while true; do
        octavo serve "$0" --pipeline-parallel-size "$SLURM_NNODES" --cluster-key cluster.key --host 0.0.0.0
        code=$?
        case "$SLURM_NODEID.$code" in 0.0 | 0.2 | 0.78) scancel "$SLURM_JOB_ID" ;; esac
        sleep 2
    done
' "$model"
