#!/bin/bash
# Trains on 8 nodes with 8 GPUs each; sbatch --nodes=16 takes another number of them:
#
#     sbatch examples/slurm/train-8-nodes.sh CONFIG RUN_DIR [KEY=VALUE ...]
#
# RUN_DIR, and all that CONFIG names, must be on a file system that all nodes share. Shortly before the job's time is
# over Slurm sends USR1 to the ranks, which save, leave the file "stopped" in RUN_DIR and end; the job then queues
# itself again, until the run is complete. It also does so after a failure, such as a lost node's, if there is a new
# checkpoint since its start: the same failure at the same place ends it.
#SBATCH --job-name=megalm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
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
