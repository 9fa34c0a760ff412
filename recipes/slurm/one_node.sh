#!/bin/bash
# One node of 8 GPUs under Slurm, from the root of the checkout, with its environment active:
#   sbatch recipes/slurm/one_node.sh data.train=train.jsonl data.test=test.jsonl
#   CONFIG=recipes/configs/lingshu_rl_7b_split.yaml RANKS=4 sbatch recipes/slurm/one_node.sh ...
#SBATCH --job-name=lingshu-rl
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
set -uo pipefail
srun --kill-on-bad-exit=1 accelerate launch --config_file recipes/accelerate/one_node.yaml \
    --num_processes "${RANKS:-8}" recipes/grpo_medvqa.py \
    --config "${CONFIG:-recipes/configs/lingshu_rl_7b.yaml}" "$@" &
launch=$!

# Before the time is over Slurm sends SIGTERM: the run saves a checkpoint and ends, and the job is put back to go on from it.
stopped=
trap 'stopped=yes; kill -TERM "$launch"' TERM
wait "$launch"; wait "$launch"
code=$?
[ -n "$stopped" ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
