"""`hf-rft`: one command for each thing that can be done from a terminal."""

import difflib
import importlib
import importlib.util
import sys
from functools import partial

from ..evaluation.provenance import versions
from .exits import exit_with, run_program
from .launch import launch, split_arguments


# Command -> what it does. The module of the same name holds its `main`; it is imported when it is asked for.
COMMANDS = {
    "train": "fine-tune an image classifier robustly, and report how robust it became",
    "evaluate": "measure the accuracy-versus-epsilon curve of any image classifier",
    "compare": "run several recipes with several seeds, and compare them",
    "study": "train over a grid of options and seeds, and compare the options with intervals",
    "leaderboard": "put the reports of several models side by side",
    "push": "publish a robust model with its evidence",
    "push-metric": "publish the `evaluate` modules as Spaces",
    "app": "serve a page on which anybody attacks a model",
}

# Those that can divide their work over several processes.
DISTRIBUTED = {"train", "evaluate"}
# Command -> the extra of the package that it needs, and what that brings.
EXTRAS = {"app": ("app", "gradio")}

USAGE = "usage: hf-rft COMMAND [options]; hf-rft COMMAND --help says which\n\n" + "\n".join(
    f"  {name:<12} {what}" for name, what in COMMANDS.items()
)


def main() -> None:
    """The console entry, also `python -m hf_rft`."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
    elif words[0] == "--version":
        print(f"hf_rft {versions()['hf_rft']}")
    elif words[0] not in COMMANDS:
        nearest = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"choose one of {', '.join(COMMANDS)}."
        exit_with(f"{words[0]!r} is not a command; {hint}", program="hf-rft")
    else:
        run(words[0], words[1:])


def run(name: str, words: list[str]) -> None:
    """Run one command, in the processes that its flags ask for, and end as it does."""
    sys.argv = [f"hf-rft {name}", *words]
    run_program(partial(_run, name, words))


def _run(name: str, words: list[str]) -> None:
    if name in DISTRIBUTED and not {"-h", "--help", "--help_all"} & set(words):
        flags, sys.argv[1:] = split_arguments(words)
        if flags:
            launch(flags, ["hf_rft", name, *sys.argv[1:]])
    extra, package = EXTRAS.get(name, ("", ""))
    if package and importlib.util.find_spec(package) is None:
        exit_with(f'it needs {package}: pip install "hf_rft[{extra}]"')
    importlib.import_module(f"..{name.replace('-', '_')}", __name__).main()
