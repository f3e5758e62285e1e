#!/usr/bin/env bash
# Llama-3-8B on one 24 GB GPU or more: the whole model on it, no sharding.
#   bash launch/llama3_8b_1gpu.sh --data my_data.jsonl
set -euo pipefail
exec python "$(dirname "$0")/train.py" \
  --model "${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}" \
  --granularity attn_sequence --layers half --capacity 0.5 \
  --seq_length 2048 --micro_batch_size 1 --gradient_accumulation_steps 16 \
  --activation_checkpointing --lr 1e-3 --max_steps 1000 "$@"
