#!/usr/bin/env bash
# Qwen2.5-72B under ZeRO-3 on 2 nodes of 8 GPUs with 80 GB (40 GB: see launch/README.md). The same line on both:
#   HEAD=node0 bash launch/qwen2.5_72b_zero3_2x8.sh --data my_data.jsonl
set -euo pipefail
export NNODES=${NNODES:-2} NPROC=${NPROC:-8}
exec bash "$(dirname "$0")/torchrun_node.sh" \
  --ds_config "$(dirname "$0")/../ds_configs/zero3_multinode.json" \
  --model "${MODEL:-Qwen/Qwen2.5-72B-Instruct}" \
  --granularity attn_sequence --layers half --capacity 0.5 \
  --seq_length 4096 --micro_batch_size 2 --gradient_accumulation_steps 1 \
  --activation_checkpointing --lr 1e-3 --max_steps 1000 "$@"
