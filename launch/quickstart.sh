#!/usr/bin/env bash
# From a fresh clone to trained routers: installs once, then runs the main job on the embedded demo.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
# DeepSpeed starts a rank per GPU; on a machine without one it starts as many as this says.
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || export LOCAL_SIZE=${LOCAL_SIZE:-2}
exec deepspeed launch/train.py --ds_config ds_configs/zero3.json "$@"
