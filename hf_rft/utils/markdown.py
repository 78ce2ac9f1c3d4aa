"""Escaping for Markdown: names and messages of reports, datasets and models are plain text, never markup."""

import re
from collections.abc import Sequence


def one_line(text: object) -> str:
    """Collapse whitespace: line breaks would start headings, table rows or front matter."""
    return " ".join(str(text).split())


def plain(text: object) -> str:
    """Plain text: no HTML, no links, no images (which a page would fetch). Code in backticks stays code."""
    # Escape existing backslashes before punctuation first, or they would undo the escapes added below.
    text = re.sub(r"\\(?=[^\w\s]|$)", r"\\\\", one_line(text))
    return text.replace("<", "&lt;").replace("](", "]\\(").replace("][", "]\\[")


def cell(text: object) -> str:
    """Plain text for a table cell."""
    return plain(text).replace("|", "\\|")


def markdown_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A table, each of whose cells is plain text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def code(text: object) -> str:
    """In backticks, where there is no markup at all."""
    return "`" + one_line(text).replace("`", "'") + "`"
