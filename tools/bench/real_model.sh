#!/usr/bin/env bash
# What pays on a real model: every method at every unit of skip, at equal FLOPs.
#
#   tools/bench/real_model.sh MODEL TEXT OUTPUT [flags of megaskip compare]
#   RUN="torchrun --nproc_per_node 8 -m megaskip" tools/bench/real_model.sh MODEL TEXT OUTPUT
#
# TEXT holds train/*.jsonl, heldout/*.jsonl (tools/make/split_texts.py writes both), and may hold blimp/ and choice/.
# OUTPUT gets a folder for each unit, with report.html. A command that was stopped goes on. A smaller try: add --steps 20
# --documents 64 --pairs 10 --seeds 0.
set -euo pipefail

if [ $# -lt 3 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
fi
model=$1 text=$2 output=$3
shift 3
run=${RUN:-python -m megaskip}

common=(--model "$model" --seeds 0,1,2 --seq_length 512 --documents 512 --pairs 200 --choice_questions 500 --steps 300)
common+=(--calibration_rows 512 --cost_rows 256 --prefill_runs 0)
for file in "$text"/train/*.jsonl; do common+=(--data "$file"); done
for file in "$text"/heldout/*.jsonl; do common+=(--eval_data "$file"); done
[ -d "$text/blimp" ] && common+=(--blimp "$text/blimp")
[ -d "$text/choice" ] && common+=(--choice "$text/choice")

drops=static,greedy,static_fitted,greedy_fitted,greedy_trained
compare() { # unit, percent of it, methods, the method that others are set against
    $run compare "${common[@]}" --granularity "$1" --layers "$LAYERS" --skip "$2" --methods "$3" --ours "$4" \
        --output "$output/$1" "${@:5}"
}

# All layers but the first, whose attention the cache needs.
depth=$(python -c 'import sys, transformers as t; print(t.AutoConfig.from_pretrained(sys.argv[1]).num_hidden_layers)' "$model")
LAYERS=1-$((depth - 1))

# Attention is about 0.44 of an MLP's multiplications and 0.31 of a block's in SmolLM2-135M: the percentages below save the same.
attn=12.5,25,37.5,50 mlp=5.5,11,16.5,22 block=3.9,7.7,11.5,15.4
lora=dense_lora,static_lora,greedy_trained_lora,ours_lora
routed=dense_adapted,random,uniform,published,ours,compensated,by_cost_fitted
compare attn_sequence $attn "$drops,$routed,$lora" greedy_trained --lora_lr 1e-3 --continuations 128 "$@"
compare mlp_sequence $mlp "$drops,random,by_cost_fitted" greedy_trained "$@"
compare block_sequence $block "$drops,random,by_cost_fitted" greedy_trained "$@"
for unit in attn mlp block; do
    compare ${unit}_token "${!unit}" greedy_trained,greedy_fitted,random,by_cost,by_cost_fitted,by_cost_trained,compensated \
        by_cost_trained "$@"
done
