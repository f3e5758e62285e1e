"""python -m megaskip: the console script, where it is not on the PATH."""

from megaskip.cli.main import main

if __name__ == "__main__":
    main(prog="python -m megaskip")
