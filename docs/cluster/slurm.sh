#!/bin/bash
# Starts Ray on the nodes of a Slurm job and scores on all of them:  sbatch slurm.sh IMAGES... -r hpsv2 -o scores.parquet
# When the time ends, the command stops, keeps what is scored, and the job goes back into the queue.
#SBATCH --job-name=diffalign
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

port=6379
# The script runs on the first node, and so do Ray's head and the command.
head=$(hostname)
export RAY_ADDRESS="$head:$port"
export RAY_USAGE_STATS_ENABLED=0

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --port="$port" --block &
until ray status > /dev/null 2>&1; do sleep 2; done
if [ "$SLURM_NNODES" -gt 1 ]; then
  others=$((SLURM_NNODES - 1))
  srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" ray start --address="$RAY_ADDRESS" --block &
fi

diffalign score "$@" --engine ray &
command=$!
trap 'kill -USR1 "$command"' USR1
code=0
wait "$command" || code=$?
# A signal ends `wait`, and not the command.
while kill -0 "$command" 2> /dev/null; do
  code=0
  wait "$command" || code=$?
done

if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
