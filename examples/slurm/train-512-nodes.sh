#!/bin/bash
# Trains on 512 nodes with 8 GPUs each, after a look at all of them:
#
#     sbatch examples/slurm/train-512-nodes.sh CONFIG RUN_DIR [KEY=VALUE ...]
#
# At this size some node is always about to fail. `megalm doctor` stops a job whose nodes differ or do not see RUN_DIR
# before it costs anything, and marks the slow ones in the log. One that fails later ends the ranks; the job queues
# itself again if there is a new checkpoint since its start, and Slurm takes another node. Before the job's time is
# over the ranks have ten minutes to save.
#SBATCH --job-name=megalm
#SBATCH --nodes=512
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
config=$1 run=$2
shift 2
newest() { grep -o 'saved the checkpoint of step [0-9]*' "$run/train.log" 2>/dev/null | tail -n 1; }
before=$(newest)

ulimit -n "$(ulimit -Hn)"  # the first rank keeps a connection to each of the others; srun passes the limit on
export PYTHONDONTWRITEBYTECODE=1  # thousands of processes would write the same files

srun --kill-on-bad-exit=1 python -m megalm.train --doctor "$config" run.dir="$run" "$@" || exit
srun --kill-on-bad-exit=1 python -m megalm.train "$config" run.dir="$run" "$@"
code=$?
if { ((code == 0)) && [[ -e $run/stopped ]]; } || { ((code != 0)) && [[ $(newest) != "$before" ]]; }; then
    scontrol requeue "$SLURM_JOB_ID" || code=1
fi
exit "$code"
