"""Command lines of the recipes: dataclasses, a YAML file for a result, and flags that win over it.

What a user gets wrong ends the program with one message on standard error and exit status 2: while the command line is
read ([`parse_with_config`]), and after ([`run_program`]). Errors of the program itself keep their traceback.
"""

import difflib
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser

from ..hub.pushing import PushError
from ..training.distributed import leave_process_group


class Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Without the usage, whose hundred lines would hide the message."""
        exit_with(message, self.prog)


def parse_with_config(
    dataclass_types: Sequence[type],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
    default_config: Callable[[set[str]], Path | None] = lambda given: None,
    tied: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """Parse dataclasses from `--config file.yaml` and flags; a flag wins over the file.

    The file's entries are read as if they had been given as flags before all others, so that types, choices and
    messages are the same for both. (`set_defaults` would neither convert nor check most of them.)

    Args:
        dataclass_types (`Sequence[type]`):
            Passed to [`~transformers.HfArgumentParser`].
        arguments (`Sequence[str]`, *optional*):
            Defaults to `sys.argv[1:]`.
        default_config (`Callable`, *optional*):
            Given the names of the flags on the command line, returns the file to use without `--config`, if any.
        tied (`Mapping[str, str]`, *optional*):
            Names that belong together: a flag for the first drops the file's value of the second.

    Returns:
        One instance of each dataclass. Bad input ends the program with a message and exit status 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(dataclass_types, description=description, allow_abbrev=False)
    names = {action.dest for action in parser._actions} - {"help"}
    parser.add_argument("--config", type=Path, help="YAML file with values for these flags; flags win over it.")
    given = {word[2:].split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    config_parser = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", type=Path)
    found, arguments = config_parser.parse_known_args(arguments)
    try:
        config = found.config or default_config(given)
        if config is not None:
            entries = read_config(config, names)
            for first, second in (tied or {}).items():
                if first in given:
                    entries.pop(second, None)
            lists = {action.dest for action in parser._actions if action.nargs == "+"}
            arguments = [*_as_flags(entries, lists), *arguments]
        _, unknown = parser.parse_known_args(arguments)
        _refuse_unknown(unknown, names)
        *instances, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except (ValueError, TypeError, OSError, ImportError) as error:  # also what transformers raises about its arguments
        exit_with(error, parser.prog)
    if config is not None:
        print(f"Configuration: {config}")
    return tuple(instances)


def _as_flags(entries: Mapping[str, Any], lists: set[str]) -> list[str]:
    """The entries of a file as words of a command line; null leaves the default."""
    words = []
    for name, value in entries.items():
        if isinstance(value, list):
            if name not in lists:
                raise ValueError(f"`{name}: {value}` is a list, but `{name}` takes one value.")
            words += [f"--{name}", *map(str, value)]
        elif value is not None:  # in one word, so that a value may begin with a dash
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"the key {twice[0]!r} stands in it twice")
        return super().construct_mapping(node, deep)


def read_config(path: Path, names: set[str]) -> dict[str, Any]:
    """The values of a YAML file by their keys, which must be among `names`.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is not YAML, or no mapping, or holds another key; the message names the file.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--config {path} is not valid YAML: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must hold `name: value` lines, got {type(values).__name__}.")
    for name in values:
        if name not in names:
            raise ValueError(f"--config {path}: unknown key {name!r}.{_nearest(str(name), names)}")
    return values


def _refuse_unknown(words: Sequence[str], names: set[str]) -> None:
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            raise ValueError(f"Unknown flag {flag}.{_nearest(flag[2:].replace('-', '_'), names, '--')}")
    if words:
        raise ValueError(f"Values {list(words)} belong to no flag.")


def _nearest(name: str, names: set[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {prefix}{matches[0]}?" if matches else " See --help for the valid names."


def run_program(main: Callable[[], Any]) -> None:
    """Run the main function of a recipe: what the user can repair ends it with one message, and exit status 2.

    That is what this package or a recipe refused; and what the operating system, the Hub or a damaged weight file
    refused, whoever asked. Anything else is an error of the program, and keeps its traceback.
    """
    try:
        main()
    except SystemExit:
        leave_process_group()
        raise
    except Exception as error:
        if not _is_users_error(error):
            raise  # without waiting for the other processes, which may wait for this one
        try:
            exit_with(error)
        finally:
            leave_process_group(all_do=False)
    leave_process_group()


def _is_users_error(error: Exception) -> bool:
    if isinstance(error, OSError | SafetensorError | PushError):
        return True
    if isinstance(error, ImportError):  # of an optional package: whoever raised it says which
        return not isinstance(error, ModuleNotFoundError)
    # Raised by this package, not by a library below.
    package = Path(__file__).parents[1]
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return isinstance(error, ValueError) and package in raised_in.parents


def exit_with(error: BaseException | str, program: str | None = None) -> NoReturn:
    """End the program with `program: error: message` on standard error, and exit status 2 as `argparse` does."""
    message = re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", r"\1_...", str(error)) or type(error).__name__  # no tokens
    print(f"{program or Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


# Flags whose values are places on one machine. Those that end in `token` are secret.
PRIVATE_FLAGS = {"output_dir", "cache_dir", "resume_from_checkpoint"}


def published_command(command: str, arguments: Sequence[str] | None = None) -> str:
    """The command line for a model card: without private flags, and with file names in place of paths."""
    words, is_private = [], False
    for word in sys.argv[1:] if arguments is None else arguments:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if flag:
            name = flag[2:].replace("-", "_")
            is_private = name in PRIVATE_FLAGS or name.endswith("token")
        if not is_private:
            value = os.path.basename(value.rstrip("/")) if value.startswith(("/", "~")) or ":\\" in value else value
            words.append(flag + equals + value)
    return f"{command} {shlex.join(words)}".strip()
