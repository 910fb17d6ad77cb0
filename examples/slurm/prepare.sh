#!/bin/bash
# Tokenizes a corpus on as many nodes as the array has tasks, each with all its CPUs:
#
#     sbatch --array=0-15 examples/slurm/prepare.sh /data/text /data/tokenizer /data/tokens
#
# The three paths must be on a file system that all nodes share, with locks. Tasks need not run at the same time, nor on
# nodes of one kind: each does its share of the units, and whichever is done last writes the manifest and puts the output
# in place. A task that was killed or requeued, submitted again, does what is missing.
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=prepare-%A_%a.log
set -euo pipefail

input=$1 tokenizer=$2 output=$3

# Its rank and the number of ranks come from SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT. Not through srun, so that
# the task's signals, and its CPUs, are the command's own.
exec megalm data prepare --input "$input" --tokenizer "$tokenizer" --output "$output"
