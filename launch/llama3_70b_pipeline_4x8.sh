#!/usr/bin/env bash
# Llama-3-70B in 8 stages, 4 replicas, on 4 nodes of 8 GPUs with 40 GB or more: a replica is a node, and between nodes
# only kilobytes travel. The same line on every node:
#   HEAD=node0 bash launch/llama3_70b_pipeline_4x8.sh --data my_data.jsonl
set -euo pipefail
export NNODES=${NNODES:-4} NPROC=${NPROC:-8}
exec bash "$(dirname "$0")/torchrun_node.sh" \
  --ds_config "$(dirname "$0")/../ds_configs/pipeline.json" --pipeline_stages 8 \
  --model "${MODEL:-meta-llama/Meta-Llama-3-70B-Instruct}" \
  --granularity attn_sequence --layers half --capacity 0.5 \
  --seq_length 4096 --micro_batch_size 1 --gradient_accumulation_steps 32 \
  --activation_checkpointing --lr 1e-3 --max_steps 1000 "$@"
