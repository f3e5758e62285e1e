#!/usr/bin/env bash
# From a fresh clone to trained routers: installs once, runs the main job on the embedded demo, and evaluates it.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh train,eval
dtype=auto
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  # DeepSpeed starts a rank per GPU; on a machine without one it starts as many as this says.
  export LOCAL_SIZE=${LOCAL_SIZE:-2}
  # Few CPUs multiply in the demo's bfloat16: the others take many times as long as in float32.
  dtype=float32
fi
deepspeed launch/train.py --ds_config ds_configs/zero3.json --dtype "$dtype" "$@"
# With flags of one's own it is another job, which the demo's tasks may not fit.
[ $# -gt 0 ] && exit
run=$(ls -dt runs/demo-attn_sequence-*/ | head -1)
exec python launch/evaluate.py --model "${run%/}" --tasks demo --apply_chat_template --dtype float32 \
  --output "${run}eval.json"
