"""Publish the `evaluate` modules as Spaces: the program is `hf_rft/cli/push_metric.py`."""

from hf_rft.cli.parsing import run_program
from hf_rft.cli.push_metric import main


if __name__ == "__main__":
    run_program(main)
