"""Sphinx configuration; no network is needed.

sphinx-build --fail-on-warning docs docs/_build/html
"""

import re
import textwrap
from importlib.metadata import version as installed_version


project = "hf_rft"
author = "the hf_rft authors"
version = release = installed_version("hf_rft")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"hf_rft {version}"
html_show_copyright = False

myst_heading_anchors = 3
nb_execution_mode = "off"  # tests/docs/test_notebooks.py runs them

autodoc_typehints = "none"  # the docstrings state types
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
nitpicky = True
# Internal, and named in docstrings all the same.
nitpick_ignore = [
    ("py:obj", name) for name in ("hf_rft.training.probe.Probe", "Run", "TIERS")
]


def markdown_to_rest(app, what, name, obj, options, lines):
    """Our docstrings are Markdown, as Hugging Face's documentation wants."""
    prose_and_code = re.split(
        r"^```python\n(.*?)^```$", "\n".join(lines), flags=re.M | re.S
    )
    for place, text in enumerate(prose_and_code):
        if place % 2:
            prose_and_code[place] = ".. code-block:: python\n\n" + textwrap.indent(
                text, "   "
            )
            continue
        text = re.sub(r"^\s*> Parameters that control.*$", "", text, flags=re.M)
        text = re.sub(r"^> \[!NOTE\]$", ".. note::\n", text, flags=re.M)
        text = re.sub(r"^> ", "   ", text, flags=re.M)
        text = re.sub(r"(?<![`\w])`([^`]+)`(?!`)", r"``\1``\\ ", text)
        prose_and_code[place] = re.sub(r"\[``(~?)([\w.]+)``\\ \]", _reference, text)
    # Napoleon takes what is before a property's first colon for its type.
    lines[:] = (": " * (what == "property") + "".join(prose_and_code)).splitlines()


def _reference(match):
    tilde, target = match.groups()
    if target.startswith("transformers"):
        return f"``{target.split('.')[-1]}``\\ "
    return f":py:obj:`{tilde}{target}`" if "." in target else f":py:obj:`.{target}`"


def setup(app):
    # Before napoleon.
    app.connect("autodoc-process-docstring", markdown_to_rest, priority=100)
