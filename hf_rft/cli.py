"""Command lines of the recipes: dataclasses, a YAML file for a result, and flags that win over it.

Whatever a user gets wrong ends the program with one message on standard error and exit status 2: while the command
line is read ([`parse_with_config`]), and after ([`run_program`]). Errors of the program itself keep their traceback.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from safetensors import SafetensorError
from transformers import HfArgumentParser

from .config_file import as_flags, read_config
from .distributed import leave_process_group
from .hub import PushError


# Exit status of a program whose input was refused, as of `argparse`.
BAD_INPUT = 2


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Without the usage, whose hundred lines would hide the message."""
        raise ValueError(message)


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
    messages are the same for both.

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
    parser = _Parser(dataclass_types, description=description, allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="YAML file with values for the flags below; flags win over it.")
    names = {action.dest for action in parser._actions} - {"help", "config"}
    given = {argument[2:].split("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
    try:
        config = _pop_config(arguments) or default_config(given)
        refuse_repeated_flags(parser, arguments)
        if config is not None:
            dropped = {second for first, second in (tied or {}).items() if first in given}
            arguments = [*_as_flags(config, parser, names, dropped), *arguments]
        namespace, remaining = parser.parse_known_args(arguments)
        refuse_leftovers(parser, arguments, remaining)
        instances = _build(dataclass_types, vars(namespace), parser)
    except (ValueError, OSError, argparse.ArgumentError) as error:
        exit_with(error, parser.prog)
    if config is not None:
        print(f"Configuration: {config}")
    return instances


def _build(dataclass_types: Sequence[type], values: dict[str, Any], parser: argparse.ArgumentParser) -> tuple:
    """An instance of each dataclass.

    Raises:
        ValueError: naming the flag whose value does not work.
    """

    def build(values: Mapping[str, Any]) -> tuple:
        names = [[field.name for field in dataclasses.fields(one) if field.init] for one in dataclass_types]
        return tuple(
            one(**{name: values[name] for name in of_one}) for one, of_one in zip(dataclass_types, names, strict=True)
        )

    try:
        return build(values)
    except Exception as error:
        given = {name: value for name, value in values.items() if value != parser.get_default(name)}
        if isinstance(error, ValueError | OSError) and any(name in str(error) for name in given):
            raise
        # A library's error that names no flag: which one, left out, makes it disappear?
        for name, value in given.items():
            default = parser.get_default(name)
            try:
                build({**values, name: default})
            except Exception:
                continue
            raise ValueError(f"--{name} {value} does not work ({type(error).__name__}: {error}).") from error
        raise


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
        if not is_users_error(error):
            raise  # without waiting for the other processes, which may wait for this one
        try:
            exit_with(error, Path(sys.argv[0]).name)
        finally:
            leave_process_group(all_do=False)
    leave_process_group()


def is_users_error(error: Exception) -> bool:
    if isinstance(error, OSError | SafetensorError | PushError):
        return True
    if isinstance(error, ImportError) and not isinstance(error, ModuleNotFoundError):
        return True  # an optional package: whoever raised it says which
    return isinstance(error, ValueError) and _is_raised_here(error.__traceback__)


def _is_raised_here(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is of this package or of the recipes beside it, and of no library below."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    package = Path(__file__).parent
    file = Path(traceback.tb_frame.f_code.co_filename)
    return any(file.is_relative_to(folder) for folder in (package, package.parent / "recipes"))


def exit_with(error: BaseException | str, program: str | None = None) -> NoReturn:
    """End the program with `program: error: message` on standard error, and exit status 2."""
    message = without_tokens(str(error)) or type(error).__name__
    print(f"{program or Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def without_tokens(text: str) -> str:
    """The text with dots in place of what looks like a token of the Hub."""
    return re.sub(r"\b(hf|api_org)_[A-Za-z0-9]{8,}", r"\1_...", text)


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


def _pop_config(arguments: list[str]) -> Path | None:
    """Take `--config FILE` or `--config=FILE` out of the arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, action="append", default=[])
    found, arguments[:] = parser.parse_known_args(arguments)
    if len(found.config) > 1:
        raise ValueError(f"`--config` is given {len(found.config)} times; put everything into one file.")
    return found.config[0] if found.config else None


def _as_flags(config: Path, parser: argparse.ArgumentParser, names: set[str], dropped: set[str]) -> list[str]:
    several = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    flags = []
    for name, value in read_config(config).items():
        if name not in names:
            raise ValueError(f"--config {config}: unknown key {name!r}.{_nearest(str(name), names)}")
        if value is not None and name not in dropped:  # null leaves the default
            flags += as_flags(name, value, where=f"--config {config}", takes_list=several.__contains__)
    return flags


def parse_flags(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None, *, knows_all: bool = True
) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a plain parser, and the words it does not know (none, if it `knows_all`).

    Bad input ends the program with a message and exit status 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        refuse_repeated_flags(parser, arguments)
        namespace, remaining = parser.parse_known_args(arguments)
        if knows_all:
            refuse_leftovers(parser, arguments, remaining)
    except ValueError as error:
        exit_with(error, parser.prog)
    return namespace, remaining


def refuse_repeated_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """`argparse` would silently take the last one.

    Raises:
        ValueError: naming the flag.
    """
    seen: dict[str, str] = {}
    for word in arguments:
        flag = word.partition("=")[0]
        action = parser._option_string_actions.get(flag) if flag.startswith("--") else None
        if action is not None and action.dest in seen:
            raise ValueError(f"{flag} is given after {seen[action.dest]}; give it once.")
        if action is not None:
            seen[action.dest] = flag


def refuse_leftovers(parser: argparse.ArgumentParser, arguments: Sequence[str], remaining: Sequence[str]) -> None:
    """
    Raises:
        ValueError: if words remain that the parser does not know, naming the flag that was meant.
    """
    names = {action.dest for action in parser._actions} - {"help"}
    for argument in remaining:
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
            raise ValueError(f"Unknown flag {flag}.{_nearest(flag[2:].replace('-', '_'), names, '--')}")
    if remaining:
        raise ValueError(f"Values {list(remaining)} belong to no flag{_flag_before(remaining[0], parser, arguments)}.")


def _flag_before(word: str, parser: argparse.ArgumentParser, arguments: Sequence[str]) -> str:
    """In words, the flag that `word` stands behind, although it takes no more values."""
    flag, room = None, 0.0
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, _ = argument.partition("=")
            action = parser._option_string_actions.get(flag)
            nargs = 0 if action is None or equals else action.nargs
            room = math.inf if nargs in ("+", "*") else 0 if nargs == 0 else 1
        elif room == 0 and argument == word:
            return f"; {flag} takes no more" if flag else ""
        elif argument == word and word.startswith("-") and flag is not None:  # a dash before what is no plain number
            return f"; if it is meant for {flag}, write {flag}={word}"
        else:
            room -= 1
    return ""


def _nearest(name: str, names: set[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {prefix}{matches[0]}?" if matches else " See --help for the valid names."
