#!/usr/bin/env bash
# One line per node, the same on all of them:
#   HEAD=node0 NNODES=2 NPROC=8 bash launch/torchrun_node.sh --ds_config ds_configs/zero3_multinode.json ...
# HEAD is the address of one node that all of them reach; ranks are numbered as nodes arrive.
# SIGTERM gives the ranks GRACE seconds to end their step and save.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${GRACE:-110}"
exec torchrun \
  --nnodes "${NNODES:?number of nodes}" \
  --nproc_per_node "${NPROC:?ranks on this node}" \
  --rdzv_backend c10d \
  --rdzv_endpoint "${HEAD:?address of one node}:${PORT:-29400}" \
  --rdzv_id "${RUN_ID:-megaskip}" \
  --max_restarts 0 \
  "$(dirname "$0")/train.py" "$@"
