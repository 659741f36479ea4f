#!/bin/bash
# A whole recipe on several nodes of a SLURM cluster: its trainings on all GPUs, everything else on the first node.
#     sbatch --nodes 4 examples/accelerate/slurm.sh fsdp2 --recipe examples/recipes/0.5b-256px --work runs/mine
# The first word is a file of this folder (ddp, fsdp2, deepspeed_zero2, deepspeed_zero3), the rest is for run_recipe.py.
# The folder of --work must be on a disk that all nodes share. A job that is put back into the queue goes on from the
# last whole checkpoints. Without SLURM start on every node, in place of accelerate:
#     torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint FIRST_NODE:29500 examples/sft.py ...
#SBATCH --job-name nextflow
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --requeue
set -euo pipefail
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
gpus=${GPUS_PER_NODE:-8}
launch="accelerate launch --config_file examples/accelerate/$1.yaml --num_machines $SLURM_NNODES"
launch+=" --num_processes $((SLURM_NNODES * gpus)) --main_process_ip $first --main_process_port 29500"
launch+=' --machine_rank $SLURM_NODEID "$@"' # each node has its own number
exec python examples/run_recipe.py "${@:2}" --launcher "srun --ntasks-per-node 1 bash -c '$launch' launch"
