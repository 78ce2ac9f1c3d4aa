"""Several recipes and seeds in one table: the program is `hf_rft/cli/compare.py`."""

from hf_rft.cli.compare import main
from hf_rft.cli.parsing import run_program


if __name__ == "__main__":
    run_program(main)
