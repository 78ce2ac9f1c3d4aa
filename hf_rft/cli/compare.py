"""Run several recipes with several seeds, and compare them: a small study.

    hf-rft compare fashion_mnist --seeds 0 1 2 --jobs 2
    hf-rft compare my_recipes/*.yaml --seeds 0 1 2 --num_train_epochs 2

Other flags are those of `hf-rft train`, and hold for all runs. The same command goes on where it was stopped. Writes
the tables and figures of `hf-rft study`, which varies more than recipes.
"""

import sys
from collections.abc import Sequence

from ..studies.grid import Study
from .exits import exit_with
from .parsing import Parser
from .recipes import find_recipes
from .study import add_run_arguments, read_recipe, run_study


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("configs", nargs="+", help="Recipes, or folders of them: by name, or YAML files.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="Seeds of each recipe.")
    add_run_arguments(parser, "outputs/compare")
    args, extra = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    paths = [path for name in args.configs for path in find_recipes("configs:", name)]
    recipes = {path.stem: {"config": str(path)} for path in paths}
    if len(recipes) < len(paths):
        exit_with("configs: two configurations have the same file name, under which results are kept.")
    description = {"common": flags_of(extra), "factors": {"recipe": recipes}, "seeds": args.seeds}
    run_study(Study.from_description(description, read_recipe), args)


def flags_of(words: Sequence[str]) -> dict[str, object]:
    """The flags of a command line as a recipe holds them."""
    given: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            given[name] = [value] if equals else []
        elif name:
            given[name].append(word)
        else:
            exit_with(f"{word} belongs to no flag; name all recipes first.")
    flags: dict[str, object] = {}
    for name, values in given.items():
        if values:
            flags[name] = values if len(values) > 1 else values[0]
        else:  # `--flag` or `--no_flag`
            flags[name.removeprefix("no_")] = not name.startswith("no_")
    return flags
