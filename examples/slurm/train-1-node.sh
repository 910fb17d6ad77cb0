#!/bin/bash
# Trains on one node with 8 GPUs:
#
#     sbatch examples/slurm/train-1-node.sh CONFIG RUN_DIR [KEY=VALUE ...]
#
# Shortly before the job's time is over Slurm sends USR1 to the ranks, which save, leave the file "stopped" in RUN_DIR
# and end; the job then queues itself again, until the run is complete. It also does so after a failure, if there is a
# new checkpoint since its start. Slurm itself queues it again when the node fails.
#SBATCH --job-name=megalm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
config=$1 run=$2
shift 2
newest() { grep -o 'saved the checkpoint of step [0-9]*' "$run/train.log" 2>/dev/null | tail -n 1; }
before=$(newest)

srun --kill-on-bad-exit=1 python -m megalm.train "$config" run.dir="$run" "$@"
code=$?
if { ((code == 0)) && [[ -e $run/stopped ]]; } || { ((code != 0)) && [[ $(newest) != "$before" ]]; }; then
    scontrol requeue "$SLURM_JOB_ID" || code=1
fi
exit "$code"
