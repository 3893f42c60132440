"""What mkdocs does besides: links out of docs/, references in docstrings, and the check that a page loads nothing."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?P<target>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
# What a browser shows as it is; other files get a name that it shows as text.
SHOWN = (".csv", ".json", ".png", ".svg", ".txt")
EXTERNAL = re.compile(r"""<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")
ROLE = re.compile(r":(?:func|class|mod|meth|attr):`[~!]?([\w.]+)`")
TITLE = re.compile(r"(?<=[^\n])\n(?=[A-Z]\w+(?:, [A-Z]\w+)*:(?: |\n))")
INLINE = re.compile(r"^(?P<title>[A-Z]\w+(?:, [A-Z]\w+)*): (?P<text>.*(?:\n {4,}.*)*)", re.MULTILINE)
JOINT = re.compile(r"^ {4}(?P<names>\w+(?:,\s+\w+)+): (?P<text>.*(?:\n {8,}.*)*)", re.MULTILINE)
# Formulas of docstrings: LaTeX that the site would need a script for, as text.
MATH = re.compile(r"^( *)\.\. math:: (.*)$", re.MULTILINE)
LATEX = (
    (re.compile(r"\\(?:mathrm|mathit|text)\{(\w+)\}"), r"\1"),
    (re.compile(r"\\sum"), "Σ"),
    (re.compile(r"\\quad"), "  "),
    (re.compile(r"\{(\w{1,2})\}"), r"\1"),
    (re.compile(r"\\alpha"), "α"),
    (re.compile(r"\\beta"), "β"),
    (re.compile(r"\\lambda"), "λ"),
    (re.compile(r"\\(?:[,;]|(?=log|exp))"), ""),
)


def on_page_markdown(markdown, page, config, files):
    """Links to files of the repository outside of docs/ lead to ``repo_url`` or, without one, to a copy in the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, match["target"]))
        if path.startswith("docs/") or not (ROOT / path).is_file():
            return match[0]  # mkdocs checks links between pages, and says what does not exist
        anchor = match["anchor"] or ""
        if config.repo_url:
            return f"]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
        copy = f"repository/{path}" + ("" if path.endswith(SHOWN) else ".txt")
        if copy not in files.src_uris:
            files.append(File.generated(config, copy, abs_src_path=os.fspath(ROOT / path)))
        return f"]({posixpath.relpath(copy, folder or '.')})"

    return LINK.sub(replace, markdown)


def on_post_page(output, page, config):  # noqa: ARG001 - mkdocs passes them by name
    """The site works without a network: a page that loads something from elsewhere is an error."""
    found = EXTERNAL.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads {found[0]}")
    return output


class PlainDocstrings(griffe.Extension):
    """Docstrings as the parser takes them.

    References become code and formulas text, sections are set apart by blank lines, a section on the line of its title
    becomes a paragraph, and ``alpha, beta: as in ...`` becomes a line for each of the two.
    """

    def on_instance(self, *, obj, **kwargs):  # noqa: ARG002 - griffe passes more
        """One object with its docstring."""
        if obj.docstring is not None:
            text = MATH.sub(self._formula, ROLE.sub(r"`\1`", obj.docstring.value))
            text = TITLE.sub("\n\n", text)
            obj.docstring.value = INLINE.sub(self._paragraph, JOINT.sub(self._each, text))

    @staticmethod
    def _formula(match: re.Match) -> str:
        text = match[2]
        for pattern, plain in LATEX:
            text = pattern.sub(plain, text)
        return f"{match[1]}    {text}"

    @staticmethod
    def _paragraph(match: re.Match) -> str:
        text = re.sub(r"\n +", "\n", match["text"])
        return f"**{match['title']}.** {text[0].upper()}{text[1:]}\n"

    @staticmethod
    def _each(match: re.Match) -> str:
        return "\n".join(f"    {name}: {match['text']}" for name in re.split(r",\s+", match["names"]))
