"""Messages as plain text, for notifications: what their CommonMark says, without its marks."""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

import regex
from markdown_it.token import Token

from belfry.core import markdown

SOURCE_CHARACTERS = 1_000
"""How many characters of a message are read for `excerpt`. Addresses of links take room, and are not shown."""

_NEAR = 20  # characters within which a cut moves to the end of a word
_MARKS = re.compile(r"[*_`\[\]<>#&\\!|~\n]|^\s|^(?:[-+]|[0-9]+[.)])\s")
_CACHED = 4_096  # texts; a message is read once for each of its recipients


@lru_cache(_CACHED)
def excerpt(content: str, characters: int) -> str:
    """The first `characters` of a content's plain text, with `…` where more follows.

    The cut is at the end of a word where one is near, and never within a grapheme. A link is its label, an image its
    description, a code block its first line. Quotes are left out, unless there is nothing else. A content that exceeds
    the parser's limits is shown as it is.
    """
    text = content if not _MARKS.search(content) else " ".join(_words(content))
    return text if len(text) <= characters else f"{_cut(text, characters)}…"


def _words(content: str) -> list[str]:
    try:
        tokens = markdown.parse(content)
    except markdown.ParseBudgetExceeded:
        return content.split()
    outside_quotes = " ".join(_texts(tokens, with_quotes=False)).split()
    return outside_quotes or " ".join(_texts(tokens, with_quotes=True)).split() or content.split()


def _texts(tokens: Iterable[Token], *, with_quotes: bool) -> Iterator[str]:
    """The text of each block."""
    quotes = 0
    for token in tokens:
        quotes += {"blockquote_open": 1, "blockquote_close": -1}.get(token.type, 0)
        if quotes and not with_quotes:
            continue
        if token.type == "inline":
            yield _inline(token.children or ())
        elif token.type in ("fence", "code_block"):
            yield next((line for line in token.content.splitlines() if line.strip()), "")


def _inline(tokens: Iterable[Token]) -> str:
    parts = []
    for token in tokens:
        if token.type == "image":
            parts.append(_inline(token.children or ()))
        elif token.type in ("softbreak", "hardbreak"):
            parts.append(" ")
        else:
            parts.append(token.content)
    return "".join(parts)


def _cut(text: str, characters: int) -> str:
    end = 0
    for grapheme in regex.finditer(r"\X", text):
        if grapheme.end() > characters:
            break
        end = grapheme.end()
    cut = text[: end or characters]
    word_end = cut.rfind(" ")
    if not text[len(cut)].isspace() and word_end >= characters - _NEAR:
        return cut[:word_end].rstrip()
    return cut.rstrip()
