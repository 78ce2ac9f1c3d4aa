"""Text from elsewhere in Markdown: names and messages of reports, datasets and models are words, never markup."""

import re


def one_line(text: object) -> str:
    """Without line ends, which begin headings, table rows and front matter."""
    return " ".join(str(text).split())


def plain(text: object) -> str:
    """As text: no HTML, no links, no pictures (which a page would fetch). Code between backticks stays code."""
    # A backslash before anything but a letter, digit or space would hide what is put before that next.
    text = re.sub(r"\\(?=[^\w\s]|$)", r"\\\\", one_line(text))
    return text.replace("<", "&lt;").replace("](", "]\\(").replace("][", "]\\[")


def cell(text: object) -> str:
    """Likewise, within a table."""
    return plain(text).replace("|", "\\|")


def code(text: object) -> str:
    """Between backticks, in which there is no markup at all."""
    return "`" + one_line(text).replace("`", "'") + "`"
