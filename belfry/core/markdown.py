"""CommonMark as Belfry reads it, with tables, strikethrough and bare URLs: one parser, with bounds for its work."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from markdown_it import MarkdownIt, helpers, rules_block
from markdown_it.common.utils import unescapeAll
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType

# The parser's work grows with length times depth, so depth is bounded. A list may be twenty levels deep (each level
# counts twice): the library's own maximum of 20 is too little for `- - - - - - - - - - cut here`, a list of ten
# levels. What is nested deeper is not parsed, nor is what follows such a list up to the end of the text, so it
# contains no mentions.
MAX_NESTING = 40

# The parser searches for the end of each block quote again, down to the next empty line, and for the end of each
# bracket, down to the end of the paragraph: `>#\n;\n` 2,000 times takes fifteen seconds without a limit. Therefore the
# work is counted in steps: a character or a skipped token is one, a line that the parser reads is ten, a character
# that may begin markup is twelve more. Ordinary texts take 2 steps a character (`make drill ARGS="rendering"`), and
# only a text that is searched repeatedly takes more than 131,000.
MAX_STEPS = 150_000
_LINE_STEPS = 10
_MARKS = "*_\\&<`@[~|"
_MARK_STEPS = 12

# A link's destination without `<>`: no white space, and balanced round brackets, up to three levels deep, as
# CommonMark requires. The library allows 32 levels and reads each character in Python, again for each `](`: 10,000
# characters of `![](` exceed MAX_STEPS.
_DESTINATION = r"(?:[^\x00-\x20\x7f()\\]++|\\[()\\]?)*+"
for _ in range(3):
    _DESTINATION = rf"(?:[^\x00-\x20\x7f()\\]++|\\[()\\]?|\({_DESTINATION}\))*+"
_find_destination = re.compile(_DESTINATION).match


# A bare URL: a scheme that no letter precedes, and what follows up to white space or a character that ends it.
_find_scheme = re.compile(r"(?<![A-Za-z0-9])https?\Z", re.IGNORECASE).search
_find_rest = re.compile(r"://[^\s<>\"\[\]`\\|]+").match
_is_delimiter_row = re.compile(r"[ \t|:-]+\Z").match
_AFTER_URL = "*_~.,;:!?'\""  # at the end of a URL they belong to the sentence

MAX_TABLE_CELLS = 2_000
"""A table has at most this many cells; a larger one is text. The library completes each row with empty cells."""


class ParseBudgetExceeded(Exception):
    """The text takes more than MAX_STEPS."""


class BudgetSpent(ParseBudgetExceeded):
    """The text takes more steps than the budget has left for it; alone it might take fewer than MAX_STEPS."""


@dataclass
class Budget:
    """Steps for several texts: `left` of them, for `texts` texts that follow.

    A fifth is reserved in equal shares, so that a short text is parsed whatever the first ones take.
    """

    left: int
    texts: int

    def __post_init__(self) -> None:
        self._reserved = self.left // 5 // max(1, self.texts)

    def take(self, most: int) -> int:
        """The steps that the next text may take, at most `most`."""
        self.texts = max(0, self.texts - 1)
        return max(0, min(most, self.left - self.texts * self._reserved))

    def spend(self, steps: int) -> None:
        """Subtract the steps that a text took, except those of its reserved share."""
        self.left = max(self.left - steps, self.texts * self._reserved)


class _CountedInline(ParserInline):
    """Count how often a token is skipped in search of a bracket's end: once for each token after each bracket."""

    def skipToken(self, state: StateInline) -> None:
        _count(state.env, 1)
        super().skipToken(state)


def _count(env: EnvType, steps: int) -> None:
    env["steps"] -= steps
    if env["steps"] < 0:
        raise ParseBudgetExceeded


def _count_line(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """A block rule that matches nothing. Tried first on each line, it counts the lines that the parser reads."""
    _count(state.env, _LINE_STEPS)
    return False


def _parse_destination(text: str, start: int, end: int) -> Any:
    """Read a link's destination that begins at `start`: `ok`, the position behind it (`pos`) and its text (`str`)."""
    if text.startswith("<", start, end):
        return helpers.parseLinkDestination(text, start, end)
    found = _find_destination(text, start, end)
    assert found is not None  # it matches an empty text
    is_complete = found.end() > start and not text.startswith("(", found.end(), end)
    return SimpleNamespace(ok=is_complete, pos=found.end(), str=unescapeAll(found[0]) if is_complete else "")


def _bare_url(state: StateInline, silent: bool) -> bool:
    """An inline rule: a bare URL is a link to itself. The parser tries it at the colon, when the scheme is read."""
    scheme = _find_scheme(state.pending[-len("xhttps") :])
    if scheme is None or state.linkLevel > 0 or not (found := _find_rest(state.src, state.pos, state.posMax)):
        return False
    _count(state.env, len(found[0]))
    rest = found[0].rstrip(_AFTER_URL)
    while rest.endswith(")") and rest.count(")") > rest.count("("):
        rest = rest[:-1].rstrip(_AFTER_URL)
    address = state.md.normalizeLink(scheme[0] + rest)
    if len(rest) < len("://a") or not state.md.validateLink(address):
        return False
    if not silent:
        state.pending = state.pending[: -len(scheme[0])]
        opened = state.push("link_open", "a", 1)
        opened.attrs, opened.markup, opened.info = {"href": address}, "linkify", "auto"
        state.push("text", "", 0).content = scheme[0] + rest
        closed = state.push("link_close", "a", -1)
        closed.markup, closed.info = "linkify", "auto"
    state.pos += len(rest)
    return True


def _small_table(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """The library's rule for tables, for those with at most MAX_TABLE_CELLS; others are paragraphs."""
    if start_line + 2 > end_line or not _is_delimiter_row(state.getLines(start_line + 1, start_line + 2, 0, False)):
        return False
    most = MAX_TABLE_CELLS // (state.getLines(start_line, start_line + 1, 0, False).count("|") + 1)
    lines = 0
    while lines <= most and start_line + lines < end_line and not state.isEmpty(start_line + lines):
        lines += 1
    _count(state.env, lines)
    return lines <= most and rules_block.table(state, start_line, end_line, silent)


def _parser() -> MarkdownIt:
    # HTML is off, so that what looks like a tag is text. `text_join` is off, because it would make an escaped `\@` and
    # a `&#64;` the same as a plain `@`.
    parser = MarkdownIt("zero")
    parser.inline = _CountedInline()
    parser.configure("commonmark", {"html": False, "maxNesting": MAX_NESTING}).disable("text_join")
    parser.enable(["table", "strikethrough"]).block.ruler.at("table", _small_table, {"alt": ["paragraph", "reference"]})
    parser.inline.ruler.after("text", "bare_url", _bare_url)
    parser.block.ruler.before("code", "count", _count_line, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    parser.helpers = SimpleNamespace(  # type: ignore[assignment]  # the library has a module there
        parseLinkDestination=_parse_destination,
        parseLinkLabel=helpers.parseLinkLabel,
        parseLinkTitle=helpers.parseLinkTitle,
    )
    # The library builds the rule lists on first use; two threads could see them incomplete.
    parser.parse("x", {"steps": MAX_STEPS})
    return parser


_PARSER = _parser()


def parse(content: str, budget: Budget | None = None) -> list[Token]:
    """Parse content into blocks; the `children` of the blocks of type `inline` are its text.

    `budget` is that of the page, and the parser's steps are subtracted from it. Raises ParseBudgetExceeded where the
    text takes more than MAX_STEPS, and BudgetSpent where it takes more than the budget has left.
    """
    allowed = MAX_STEPS if budget is None else budget.take(MAX_STEPS)
    env = {"steps": allowed}
    try:
        _count(env, len(content) + _MARK_STEPS * sum(map(content.count, _MARKS)))
        return _PARSER.parse(content, env)
    except ParseBudgetExceeded:
        if allowed < MAX_STEPS:
            raise BudgetSpent from None
        raise
    finally:
        if budget is not None:
            budget.spend(allowed - max(0, env["steps"]))


def tokens_outside_quotes(tokens: Iterable[Token]) -> Iterable[Sequence[Token]]:
    """The text of each block outside block quotes, as tokens."""
    quotes = 0
    for token in tokens:
        if token.type == "blockquote_open":
            quotes += 1
        elif token.type == "blockquote_close":
            quotes -= 1
        elif token.type == "inline" and not quotes:
            yield token.children or ()
