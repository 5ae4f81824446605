#!/bin/bash
# Trains on all GPUs of several nodes:  sbatch --nodes=4 slurm-train-nodes.sh train sdxl_dpo data.path=data/mine run_dir=runs/a
# Data, cache and run_dir must lie on a disk that all nodes see. Else as slurm-train.sh.
#SBATCH --job-name=diffalign
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# One process a GPU, started by srun: so each gets the signal, and srun returns the exit code. torchrun does neither.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500
# shellcheck disable=SC2016 # the variables are those of each process
srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=0 WORLD_SIZE=$SLURM_NTASKS exec diffalign "$@"' diffalign "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
