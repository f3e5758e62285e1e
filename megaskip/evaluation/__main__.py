"""python -m megaskip.evaluation: lm-eval's own command line with megaskip's model in it."""

from megaskip.cli.lm_eval import main
from megaskip.cli.run import run_cli

if __name__ == "__main__":
    run_cli(main)
