"""A page on which anybody attacks a model: the program is `hf_rft/cli/app.py`."""

from hf_rft.cli.app import main
from hf_rft.cli.parsing import run_program


if __name__ == "__main__":
    run_program(main)
