"""Text from elsewhere in Markdown: names and messages of reports, datasets and models are words, never markup."""

import re


def one_line(text: object) -> str:
    """Without line ends, which begin headings, table rows and front matter."""
    return " ".join(str(text).split())


def plain(text: object) -> str:
    """As text: no HTML, no links, no pictures (which a page would fetch). Code between backticks stays code."""
    return one_line(text).replace("\\", "\\\\").replace("<", "&lt;").replace("](", "]\\(").replace("][", "]\\[")


def cell(text: object) -> str:
    """Likewise, within a table."""
    return plain(text).replace("|", "\\|")


def code(text: object) -> str:
    """Between backticks, in which there is no markup at all."""
    # Parts of the card begin and end with comments.
    return "`" + re.sub(r"<(?=!--)", "< ", one_line(text).replace("`", "'")) + "`"
