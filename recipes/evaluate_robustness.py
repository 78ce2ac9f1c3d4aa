"""The accuracy-versus-epsilon curve of a classifier: the program is `hf_rft/cli/evaluate.py`."""

from hf_rft.cli.evaluate import main
from hf_rft.cli.parsing import run_program


if __name__ == "__main__":
    run_program(main)
