#!/usr/bin/env bash
# A backbone of 10.7 M parameters and 12 layers to measure routing on: an hour or two on a CPU, minutes on a GPU.
#   python tools/make/make_backbone.py --text TEXT_DIR --instruct alpaca.json --work_dir WORK
#   bash launch/backbone.sh --model WORK/init --data WORK/text.jsonl --data alpaca.json \
#     --eval_data WORK/heldout_text.jsonl --output_dir WORK/run
# The trained model is WORK/run/model. An interrupted run goes on with --resume auto.
set -euo pipefail
exec python "$(dirname "$0")/train.py" --train full --packing \
  --seq_length 256 --micro_batch_size 4 --gradient_accumulation_steps 1 \
  --dtype float32 --lr 1.5e-3 --warmup_ratio 0.03 --weight_decay 0.1 \
  --max_steps 3000 --save_every 100 --seed 11 "$@"
