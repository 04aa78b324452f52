"""The site: `sphinx-build -W docs site` makes it, `python -m http.server -d site` shows it.

Pages are Markdown. Their markers are replaced by what the code says (`docs/reference.py`), and
docstrings, which are Markdown too, are read as such where Sphinx shows them.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that docs.reference is found

from bs4 import BeautifulSoup, Tag

from docs.reference import MARKER, plugin_groups, with_reference

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "NEXUS trainer"
author = copyright = "the NEXUS trainer authors"
release = metadata.version("nexus-trainer")
PHONE = 24  # letters in a cell: with more, a table of several columns is too wide for a phone
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["llms.txt"]
html_theme = "furo"
html_title = project
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_show_sphinx = html_show_sourcelink = html_copy_source = False
COLORS = {
    "color-brand-primary": "#3f51b5",
    "color-brand-content": "#3f51b5",
    "color-api-name": "var(--color-brand-content)",
    "color-sidebar-link-text--top-level": "var(--color-foreground-primary)",
}
html_theme_options = {
    "top_of_page_buttons": [],
    "light_css_variables": COLORS,
    "dark_css_variables": {
        **COLORS,
        "color-brand-primary": "#9fa8da",
        "color-brand-content": "#9fa8da",
    },
}
pygments_style, pygments_dark_style = "friendly", "monokai"
copybutton_prompt_text = "$ "

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
smartquotes = False  # settings are to be copied
default_role = "py:obj"
toc_object_entries_show_parents = "hide"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 72
napoleon_custom_sections = [("Source", "notes_style"), ("Legend", "notes_style")]
napoleon_use_rtype = False


def setup(app: Sphinx) -> None:
    """Connect what is done to pages and docstrings."""
    app.connect("env-get-outdated", lambda app, env, *_: _filled(env))
    app.connect("source-read", _fill)
    app.connect("html-page-context", _group, priority=400)  # before the theme draws the sidebar
    app.connect("html-page-context", _finish)
    app.connect("autodoc-process-docstring", _read, priority=100)  # before napoleon


def _filled(env: BuildEnvironment) -> list[str]:
    """The pages with a marker: they are as old as the code, not as their file."""
    return [name for name in env.found_docs if MARKER.search(env.doc2path(name).read_text())]


def _fill(_app: Sphinx, _name: str, source: list[str]) -> None:
    source[0] = with_reference(source[0])


def _finish(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _: object) -> None:
    """Have dashes look like dashes, and tables fit."""
    body = re.sub("(</strong>(?:</a>)?) -- ", "\\1 \N{EN DASH} ", context.get("body", ""))
    if "<table" in body:
        soup = BeautifulSoup(body, "html.parser")
        for table in soup.find_all("table"):
            _fit(table)
        body = str(soup)
    context["body"] = body


def _fit(table: Tag) -> None:
    """Give cells the name of their column, which `style.css` shows where a row is too wide."""
    head = [cell.get_text() for cell in table.select("thead th")]
    rows = [row.find_all("td") for row in table.select("tbody tr")]
    longest = max((len(cell.get_text()) for row in rows for cell in row), default=0)
    names = [word for row in rows if row for word in row[0].get_text().split()]
    short = max(map(len, names), default=0) <= PHONE
    kinds = {
        "short": short,
        "stacked": longest > PHONE and (len(head) > 2 or not short),
        "wide": longest > PHONE and len(head) > 4,
    }
    table["class"] = [*table.get("class", []), *(kind for kind, yes in kinds.items() if yes)]
    if kinds["stacked"]:
        for row in rows:
            for cell, name in zip(row, head, strict=False):
                cell["data-label"] = name
    if kinds["wide"]:
        for code in table.select("code .pre"):
            if len(code.get_text()) > PHONE // 2:
                _let_break(code)


def _let_break(code: Tag) -> None:
    """Have a long name break between its words."""
    word = r"[^\W_]"
    parts = rf"(?<={word}[_.(/])(?={word})|(?<=[a-z])(?=[A-Z])"
    first, *rest = re.split(parts, code.get_text())
    code.string = first
    for part in rest:
        code.extend([Tag(name="wbr", can_be_empty_element=True), part])


def _group(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _: object) -> None:
    """Have the sidebar list the plugins by what they do."""
    if toctree := context.get("toctree"):
        context["toctree"] = lambda **options: _with_groups(toctree(**options))


def _with_groups(tree: str) -> str:
    """The navigation with an entry for each group of plugins, and its plugins below it."""
    soup, groups = BeautifulSoup(tree, "html.parser"), plugin_groups()
    for below in soup.select("li.toctree-l1 > ul"):
        entries = {entry.get_text(): entry for entry in below.find_all("li")}
        if entries.keys() >= set(chain(*groups.values())):
            _put_into_groups(soup, below, entries, groups)
    return str(soup)


def _put_into_groups(
    soup: BeautifulSoup, below: Tag, entries: dict[str, Tag], groups: dict[str, list[str]]
) -> None:
    page = last = below.parent
    for heading, names in groups.items():
        members = [entries[name] for name in names]
        here = {kind for entry in members for kind in entry["class"] if kind == "current"}
        group = soup.new_tag("li", attrs={"class": ["toctree-l1", *here]})
        link = f"{page.a['href'].rstrip('#')}#{heading.lower().replace(' ', '-')}"
        group.append(soup.new_tag("a", href=link, string=heading, attrs={"class": "reference"}))
        group.append(soup.new_tag("ul"))
        group.ul.extend(members)
        last.insert_after(group)
        last = group
    below.decompose()


def _read(*event: Any) -> None:
    """Have a docstring mean in reStructuredText what it says in Markdown, as far as it uses it."""
    lines: list[str] = event[-1]
    text = re.sub(r":\n\n(?= {4}\S)", "::\n\n", "\n".join(lines))  # an indented block is code
    parts = re.split(r"`([^`]*)`", text)
    prose, code = parts[::2], parts[1::2]
    said = [re.sub(r"[*|]|_\b", r"\\\g<0>", words) for words in prose]
    said[1:] = [re.sub(r"^(?=\w)", r"\\ ", words) for words in said[1:]]  # the s of `Hint`s
    quoted = [f"`{c}`" if re.fullmatch(r"[\w.]+", c) else f"``{c}``" for c in code]
    lines[:] = "".join(chain(*zip_longest(said, quoted, fillvalue=""))).split("\n")
