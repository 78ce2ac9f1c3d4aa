"""Publish a robust model with its evidence: the program is `hf_rft/cli/push.py`."""

from hf_rft.cli.parsing import run_program
from hf_rft.cli.push import main


if __name__ == "__main__":
    run_program(main)
