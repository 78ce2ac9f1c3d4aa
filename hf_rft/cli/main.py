"""`hf-rft`: one command for each thing that can be done from a terminal."""

import importlib
import sys

from ..evaluation.provenance import versions
from .parsing import exit_with, run_program


# Command -> what it does. The module of the same name holds its `main`; it is imported when it is asked for.
COMMANDS = {
    "train": "fine-tune an image classifier robustly, and report how robust it became",
    "evaluate": "measure the accuracy-versus-epsilon curve of any image classifier",
    "compare": "run several recipes with several seeds, into one table and one figure",
    "leaderboard": "put the reports of several models side by side",
    "push": "publish a robust model with its evidence",
    "push-metric": "publish the `evaluate` modules as Spaces",
    "app": "serve a page on which anybody attacks a model",
}

USAGE = "usage: hf-rft COMMAND [options]; hf-rft COMMAND --help says which\n\n" + "\n".join(
    f"  {name:<12} {what}" for name, what in COMMANDS.items()
)


def main() -> None:
    """The console entry, also `python -m hf_rft`."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return
    if words[0] == "--version":
        print(f"hf_rft {versions()['hf_rft']}")
        return
    if words[0] not in COMMANDS:
        exit_with(f"{words[0]!r} is no command; choose one of {', '.join(COMMANDS)}.", program="hf-rft")
    command = importlib.import_module(f"..{words[0].replace('-', '_')}", __name__)
    sys.argv = [f"hf-rft {words[0]}", *words[1:]]
    run_program(command.main)
