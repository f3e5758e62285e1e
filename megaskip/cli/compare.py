"""Does routing pay? Held-out quality at equal skip: dense, dropped, random, published, ours.

    megaskip compare --model path/to/model --data train.jsonl --eval_data heldout.jsonl \\
        --blimp path/to/blimp --skip 12.5,25,37.5,50 --seeds 0,1,2 --output comparison

Trains what is to be trained (runs of these settings that are there are taken, others refused), puts
every method at the same shares of all attention skipped, and writes into the output folder

  report.html             all figures and tables, in one file that needs nothing else
  report.json, report.md  points and paired differences with 95 % intervals
  pareto.png              loss against FLOPs and against measured prefill time
  layers.png              what each method skips, by layer
  token_map.png, .html    what ours does to one document
  measured/               what was measured so far: the same command goes on with the rest

Under torchrun ranks share out trainings and measurements, each with a whole model of its own; they
meet in the output folder, which all of them must see.

methods:
  static     drops the attention that changes its input least (LLM-Drop), the same for all texts
  greedy     drops the attention whose loss is lowest, measured with what is dropped before
  static_fitted, greedy_fitted
             the same with maps in the dropped layers' places, in closed form (megaskip fit); greedy
             chooses with the maps in place
  static_trained, greedy_trained
             the same, the maps trained together afterwards (megaskip drop); whole layers
  by_cost, by_cost_fitted
             routers in closed form that predict what skipping costs (megaskip fit-routers), without
             and with maps in closed form
  by_cost_trained
             the same routers, which stay as they are (--freeze_routers), and their maps trained
             together afterwards, for every skip
  random     other layers for every text
  uniform    every n-th layer
  random_fitted, uniform_fitted
             the same with maps in the places of what is skipped, in closed form
  published  one training for every skip: per-layer hinge on whole sequences, the strongest of the
             published settings; measured on prompts like all others, at a threshold that is
             searched afterwards, which the published code does not do
  ours       one training for all skips (--capacity_low)
  allocated  the same routers, each layer with its own threshold (megaskip calibrate --allocate)
  separate   ours, with one training for every skip
  compensated
             separate, with maps in the place of what is skipped, trained together
  dense_adapted
             a control that skips nothing: LoRA of as many parameters as the maps at that skip have,
             in all sublayers of the kind, trained as they are, on the same text for as many steps
             (needs peft). How much a training gives by itself, and what fit and training cost
             beside it
  dense_lora, static_lora, greedy_trained_lora, ours_lora
             LoRA of rank --lora_rank on all linear layers (needs peft), trained on the text with
             nothing skipped, with the layers of static dropped, together with the maps of
             greedy_trained, and together with routers, for every skip
  layerwise  separate, with the published hinge as its budget
  distill, noise, sharp, smooth, affine, mlp
             ours with one option more: --distill 0.5, --noise 0.5, --temperature 0.3 or 3,
             --router affine, --router mlp
"""

from collections.abc import Sequence

from megaskip.config.cli import parse_options
from megaskip.config.commands.compare import CompareOptions


def main(argv: Sequence[str], prog: str = "megaskip compare") -> None:
    """Compare as the flags say."""
    options = parse(argv, prog)
    from megaskip.study.job import compare

    compare(options)


def parse(argv: Sequence[str], prog: str = "megaskip compare") -> CompareOptions:
    """Return the options; raises ConfigError with every problem."""
    return parse_options(CompareOptions, argv, prog=prog, description=__doc__)
