"""The YAML file of a recipe: one line a flag.

Stricter than YAML, because every leniency there makes another experiment of a typing error: a key stands once, and no
value refers to another one. Only plain values are made of what the file says, never other Python objects.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError


# A recipe has some dozens of lines.
MAX_BYTES = 1_000_000

# What `argparse` takes for a value although it begins with a dash.
_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise ComposerError(None, None, f"found the alias *{event.anchor}; write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        refuse_repeated_keys(node)
        return super().construct_mapping(node, deep)


def refuse_repeated_keys(node: yaml.MappingNode) -> None:
    """YAML would take the last one."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConstructorError(
                    None, None, f"the key {key.value!r} is in line {lines[key.value]} and again in line {line}"
                )
            lines[key.value] = line


def read_config(path: Path) -> dict[Any, Any]:
    """The values of a YAML file by their keys: text, numbers, true and false, null, and lists and mappings of these.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is not YAML in UTF-8, or no mapping; the message names file and, where it can, key.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"--config {path} is no file; give a YAML file with `name: value` lines.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"--config {path} has more than {MAX_BYTES} bytes; it cannot be a recipe.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is not in UTF-8 ({error}); save it in that encoding.") from error
    try:
        return _read(text, path)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not valid YAML: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"--config {path} is nested too deeply; a recipe holds `name: value` lines.") from error


def _read(text: str, path: Path) -> dict[Any, Any]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            kind = type(None if node is None else loader.construct_document(node)).__name__
            raise ValueError(f"--config {path} must hold `name: value` lines, got {kind}.")
        refuse_repeated_keys(node)
        values = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"--config {path} has a key in line {line} that is no plain value.")
            where = f"--config {path}: `{key_node.value}` in line {line}"
            name = _construct(loader, key_node, where)
            values[name] = _construct(loader, value_node, where)
        return values
    finally:
        loader.dispose()


def _construct(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> Any:
    try:
        value = loader.construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # a date that does not exist, a number of 5000 digits
        raise ValueError(f"{where} cannot be read: {error}.") from error
    except TypeError as error:
        raise ValueError(f"{where} has a key that is no plain value: {error}.") from error
    if isinstance(value, bytes | set):
        raise ValueError(f"{where} is a {type(value).__name__}; write text, a number, a list or a mapping.")
    return value


def as_flags(name: str, value: Any, *, where: str, takes_list: Callable[[str], bool]) -> list[str]:
    """The words of a command line that stand for one entry of the file.

    Raises:
        ValueError: naming the entry, if no command line could say that.
    """
    written = f"{where}: `{name}: {value}`"
    if isinstance(value, dict):
        try:
            return [f"--{name}={json.dumps(value)}"]
        except TypeError as error:
            raise ValueError(f"{written} is more than text, numbers, lists and mappings: {error}.") from error
    if not isinstance(value, list):  # in one word, so that a value may begin with a dash
        return [f"--{name}={value}"]
    if not takes_list(name):
        raise ValueError(f"{written} is a list, but `{name}` takes one value.")
    words = [str(item) for item in value]
    for item, word in zip(value, words, strict=True):
        if isinstance(item, dict | list | set | bytes) or item is None:
            raise ValueError(f"{written} holds {item!r}; give a list of plain values.")
        if word.startswith("-") and not _NEGATIVE_NUMBER.fullmatch(word):
            raise ValueError(f"{written} holds {word!r}, which a command line takes for a flag.")
    return [f"--{name}", *words]
