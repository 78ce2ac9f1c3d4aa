"""Robust fine-tuning, for `accelerate launch recipes/run_rft.py`: the program is `hf_rft/cli/train.py`."""

from hf_rft.cli.parsing import run_program
from hf_rft.cli.train import main


if __name__ == "__main__":
    run_program(main)
