"""Command lines: dataclasses, a YAML file per result, and flags that win over it."""

import argparse
import difflib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from .exits import exit_with
from .launch import add_launch_arguments
from .recipes import find_file


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Each flag on a line of its own, under one name; examples as they were written."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 120))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        if action.nargs == "?":  # `--flag` means True
            value = "" if action.default is False else _value_name(action)
        else:
            value = self._format_args(action, _value_name(action))
        return f"{action.option_strings[-1 if action.dest == 'help' else 0]} {value}".strip()

    def _get_help_string(self, action: argparse.Action) -> str:
        """Of a long text the first sentence."""
        text = (action.help or "").strip()
        text = text if len(text) < 150 else text.split(". ")[0].rstrip(".") + "."
        if action.required and action.option_strings:
            return f"{text} Required."
        if action.default in (None, False, argparse.SUPPRESS, "", []) or action.nargs == 0 or "efault:" in text:
            return text
        default = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
        return f"{text} Default: {default.replace('%', '%%')}."


def _value_name(action: argparse.Action) -> str:
    """What help shows in place of a flag's value."""
    if action.metavar is not None:
        return str(action.metavar)
    if action.choices is not None:
        choices = "{" + ",".join(map(str, action.choices)) + "}"
        return choices if len(choices) < 80 else "NAME"
    if isinstance(action.default, bool):
        return "BOOL"
    return {int: "N", float: "X"}.get(action.type, "TEXT")  # pyright: ignore[reportCallIssue]


class Parser(HfArgumentParser):
    """Help in sections, and errors in one line.

    Args:
        sections (`Mapping[str, Sequence[str]]`, *optional*):
            Title -> names of the flags that `--help` shows under it. The other flags are left to `--help_all`. None:
            all flags, in one section.
    """

    def __init__(self, *args, sections: Mapping[str, Sequence[str]] | None = None, **kwargs):
        super().__init__(*args, formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)
        self.sections = sections
        if sections is not None:
            self._actions[0].help = "Show this."
            self.add_argument("--help_all", action="store_true", help="Show all flags, those of transformers too.")

    def error(self, message: str) -> NoReturn:
        """Without the usage, which would hide the message."""
        exit_with(message, self.prog)

    def parse_known_args(self, args=None, namespace=None):
        if self.sections is not None and "--help_all" in (sys.argv[1:] if args is None else args):
            print(self.format_help(with_all=True))
            self.exit()
        return super().parse_known_args(args, namespace)

    def format_help(self, with_all: bool = False) -> str:
        flags = {}
        for action in self._actions:
            flags.setdefault(action.dest, action)  # only the first of `--flag` and `--no_flag`
        sections = {"flags": list(flags)} if self.sections is None else dict(self.sections)
        if with_all:
            shown = {name for names in sections.values() for name in names}
            sections["further flags"] = [name for name in flags if name not in shown]
        required = [
            f"{action.option_strings[0]} {_value_name(action)}" if action.option_strings else f"{action.dest} ..."
            for action in self._actions
            if action.required
        ]
        formatter = HelpFormatter(self.prog)
        formatter.add_text(" ".join(["usage:", self.prog, *required, "[flags]"]))
        formatter.add_text(self.description)
        for title, names in sections.items():
            formatter.start_section(title)
            formatter.add_arguments([flags[name] for name in names])
            formatter.end_section()
        return formatter.format_help()


def parse_with_config(
    dataclass_types: Sequence[type],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
    default_config: Callable[[set[str]], Path | None] = lambda given: None,
    tied: Mapping[str, str] | None = None,
    sections: Mapping[str, Sequence[str]] | None = None,
    is_launched: bool = False,
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
        sections (`Mapping[str, Sequence[str]]`, *optional*):
            Of the help; see [`Parser`].
        is_launched (`bool`, *optional*, defaults to `False`):
            Show the flags of [`~hf_rft.cli.launch`] in the help; whoever starts the command has taken them out.

    Returns:
        One instance of each dataclass. Bad input ends the program with a message and exit status 2.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(dataclass_types, description=description, sections=sections)
    names = {action.dest for action in parser._actions} - {"help", "help_all"}
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="YAML file, or name of a recipe, with values for these flags; flags win over it.",
    )
    if is_launched:
        add_launch_arguments(parser)
    given = {word[2:].split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    config_parser = Parser(prog=parser.prog, add_help=False)
    config_parser.add_argument("--config")
    found, arguments = config_parser.parse_known_args(arguments)
    try:
        config = default_config(given) if found.config is None else find_file("--config", found.config)
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


def read_config(path: Path, names: set[str] | None = None, argument: str = "--config") -> dict[str, Any]:
    """The values of a YAML file by their keys, which must be among `names`, if these are given.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is not YAML, or no mapping, or holds another key; the message names the file.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{argument} {path} is not valid YAML: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{argument} {path} must hold `name: value` lines, got {type(values).__name__}.")
    for name in values:
        if names is not None and name not in names:
            raise ValueError(f"{argument} {path}: unknown key {name!r}.{_nearest(str(name), names)}")
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
