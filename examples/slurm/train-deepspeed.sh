#!/bin/bash
# Trains with DeepSpeed's launcher, which srun starts once a node in place of ssh, on any number of nodes with 8 GPUs
# each (another number of ranks a node: RANKS_PER_NODE=4 sbatch ...):
#
#     sbatch --nodes=512 examples/slurm/train-deepspeed.sh CONFIG RUN_DIR [KEY=VALUE ...]
#
# DeepSpeed's launcher does not pass signals on (USR1 would end it and leave its ranks behind), so the ranks look at
# the clock themselves: run.time_limit is the job's time without what starting takes. They save, leave the file
# "stopped" in RUN_DIR and end; the job then queues itself again, until the run is complete, and after a failure if
# there is a new checkpoint since its start.
#SBATCH --job-name=megalm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
config=$1 run=$2
shift 2
newest() { grep -o 'saved the checkpoint of step [0-9]*' "$run/train.log" 2>/dev/null | tail -n 1; }
before=$(newest)

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
hosts=$(mktemp "$PWD/hosts-$SLURM_JOB_ID.XXXXXX")
trap 'rm -f "$hosts"' EXIT
sed "s/\$/ slots=${RANKS_PER_NODE:-8}/" <<<"$nodes" >"$hosts"

# shellcheck disable=SC2016 # each task has its own SLURM_NODEID
srun --kill-on-bad-exit=1 bash -c 'exec deepspeed --no_ssh --node_rank "$SLURM_NODEID" "$@"' deepspeed \
    --hostfile "$hosts" --master_addr "${nodes%%$'\n'*}" --master_port "$((20000 + SLURM_JOB_ID % 10000))" \
    --module megalm.train "$config" run.dir="$run" run.time_limit=23:50:00 "$@"
code=$?
if { ((code == 0)) && [[ -e $run/stopped ]]; } || { ((code != 0)) && [[ $(newest) != "$before" ]]; }; then
    scontrol requeue "$SLURM_JOB_ID" || code=1
fi
exit "$code"
