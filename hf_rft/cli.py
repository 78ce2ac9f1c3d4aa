"""Command lines of the recipes: dataclasses, a YAML file for a result, and flags that win over it."""

import argparse
import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


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
        if config is not None:
            dropped = {second for first, second in (tied or {}).items() if first in given}
            arguments = [*_as_flags(config, names, dropped), *arguments]
        *instances, remaining = parser.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        for argument in remaining:
            if argument.startswith("--"):
                flag = argument.partition("=")[0]
                raise ValueError(f"Unknown flag {flag}.{_nearest(flag[2:].replace('-', '_'), names, '--')}")
        if remaining:
            raise ValueError(f"Values {remaining} belong to no flag.")
    except (ValueError, OSError, argparse.ArgumentError) as error:
        parser.exit(2, f"{parser.prog}: error: {without_tokens(str(error))}\n")
    if config is not None:
        print(f"Configuration: {config}")
    return tuple(instances[: len(dataclass_types)])  # a last one would hold `--config`


class _Parser(HfArgumentParser):
    """Whose messages, which quote what was typed, hold no token."""

    def error(self, message: str):
        super().error(without_tokens(message))


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


def _as_flags(config: Path, names: set[str], dropped: set[str]) -> list[str]:
    try:
        text = config.read_text(encoding="utf-8")
        # A few lines of aliases of aliases stand for gigabytes.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError(f"{config} uses an alias (`*name`); write the value out.")
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{config} must hold `name: value` lines, got {type(values).__name__}.")
    flags = []
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"{config}: unknown key {name!r}.{_nearest(str(name), names)}")
        if value is None or name in dropped:  # leaves the default
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:  # in one word, so that a value may begin with a dash
            flags.append(f"--{name}=" + (json.dumps(value) if isinstance(value, dict) else str(value)))
    return flags


def _nearest(name: str, names: set[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {prefix}{matches[0]}?" if matches else " See --help for the valid names."
