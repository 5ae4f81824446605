#!/bin/bash
# Runs one command on one GPU:  sbatch slurm-train.sh train sdxl_dpo data.path=data/mine run_dir=runs/sdxl
# Two minutes before the time limit, and at a pre-emption, it saves a checkpoint, and the job goes back into the queue.
#SBATCH --job-name=diffalign
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

srun diffalign "$@"
code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
