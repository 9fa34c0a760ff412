#!/bin/bash
# Lingshu-32B on two nodes of 8 GPUs under Slurm, from a checkout that both nodes see:
#   sbatch recipes/slurm/two_nodes.sh run.dir=/shared/runs/32b data.train=train.jsonl data.test=test.jsonl
# Node 0 starts the rollout server on its last two GPUs; node 1 serves the reference on its own last two.
#SBATCH --job-name=lingshu-rl-32b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:TERM@900
#SBATCH --requeue
set -uo pipefail
export CONFIG=${CONFIG:-recipes/configs/lingshu_32b_2x8.yaml}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NODE0=${hosts[0]} NODE1=${hosts[1]}
LINGSHU_RL_TOKEN=$(python3 -c 'import secrets; print(secrets.token_urlsafe(24))')
export LINGSHU_RL_TOKEN
srun --kill-on-bad-exit=1 bash -c '
    if [ "$SLURM_NODEID" -eq 1 ]; then
        lingshu-rl serve reference --port 8200 --host 0.0.0.0 --config "$CONFIG" "$@" \
            "reference.urls=[]" "devices.reference=[6,7]" &
        trap "kill $!" EXIT
    fi
    accelerate launch --config_file recipes/accelerate/two_nodes.yaml --num_processes 12 \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$NODE0" recipes/grpo_medvqa.py \
        --config "$CONFIG" "$@" "reference.urls=[http://$NODE1:8200]"
' two_nodes "$@" &
launch=$!

# Before the time is over Slurm sends SIGTERM: the run saves a checkpoint and ends, and the job is put back to go on from it.
stopped=
trap 'stopped=yes; kill -TERM "$launch"' TERM
wait "$launch"; wait "$launch"
code=$?
[ -n "$stopped" ] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
