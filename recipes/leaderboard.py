"""The reports of several models side by side: the program is `hf_rft/cli/leaderboard.py`."""

from hf_rft.cli.leaderboard import main
from hf_rft.cli.parsing import run_program


if __name__ == "__main__":
    run_program(main)
