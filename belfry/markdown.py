"""CommonMark as Belfry reads it: one parser for what is a mention and for what is shown, and bounds for its work."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.parser_inline import ParserInline
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType

# The parser's work grows with length times depth, so depth has a maximum. A list may be twenty deep (each
# level counts twice): the library's own maximum of 20 is too little for `- - - - - - - - - - cut here`, which
# is a list ten deep. What lies deeper is not parsed, nor is what follows a list as deep as that, up to the
# end of the text, and so it names nobody.
MAX_NESTING = 40

# The parser looks for each block quote's end anew, down to the next empty line, and for each bracket's, down to
# the paragraph's: `>#\n;\n` 2,000 times over took it fifteen seconds. So what it looks at is counted, in steps of
# about 0.3 µs: a token is one, a line is ten. Honest text of 10,000 characters takes some 50,000, and nothing but
# empty items of a list 100,000.
MAX_STEPS = 1_000_000
_LINE_STEPS = 10
_MARKS = "*_\\&<`@["
_MARK_STEPS = 12


class TooEntangled(Exception):
    """The text takes more steps than it may."""


@dataclass
class Budget:
    """Steps for several texts together: `left` of them, for so many `texts` to come.

    A fifth of it is theirs in equal parts, so that whatever the first ones take, a short text is read.
    """

    left: int
    texts: int

    def __post_init__(self) -> None:
        self._reserved = self.left // 5 // max(1, self.texts)

    def take(self, most: int) -> int:
        """How many the next text may take, and no more than `most`."""
        self.texts = max(0, self.texts - 1)
        return max(0, min(most, self.left - self.texts * self._reserved))

    def spend(self, steps: int) -> None:
        """So many were taken, of what is not kept for those to come."""
        self.left = max(self.left - steps, self.texts * self._reserved)


class _CountedInline(ParserInline):
    """Counts how often a token is skipped in search of a bracket's end: once for each token after each bracket."""

    def skipToken(self, state: StateInline) -> None:
        _count(state.env, 1)
        super().skipToken(state)


def _count(env: EnvType, steps: int) -> None:
    env["steps"] -= steps
    if env["steps"] < 0:
        raise TooEntangled


def _count_line(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """A block rule that matches nothing, and is asked first about each line whenever it is looked at."""
    _count(state.env, _LINE_STEPS)
    return False


def _parser() -> MarkdownIt:
    # HTML is off because messages are displayed so: what looks like a tag is text. `text_join` is off because it
    # would make an escaped `\@` and a `&#64;` the same as a plain `@`.
    parser = MarkdownIt("zero")
    parser.inline = _CountedInline()
    parser.configure("commonmark", {"html": False, "maxNesting": MAX_NESTING}).disable("text_join")
    parser.block.ruler.before("code", "count", _count_line, {"alt": ["paragraph", "reference", "blockquote", "list"]})
    # The rule lists are put together on first use; two threads at once could see them half full.
    parser.parse("x", {"steps": MAX_STEPS})
    return parser


_PARSER = _parser()


def parse(content: str, steps: int = MAX_STEPS, budget: Budget | None = None) -> list[Token]:
    """The content's blocks; the `children` of those of type `inline` are its text. Raises TooEntangled where that
    takes more than so many steps, or more than the budget, which it uses, has for it."""
    if budget is None:
        return _PARSER.parse(content, {"steps": steps})
    allowed = budget.take(steps)
    env = {"steps": allowed}
    try:
        # What is not looked at twice takes its time as well, and emphasis, escapes and mentions the most.
        _count(env, len(content) + _MARK_STEPS * sum(map(content.count, _MARKS)))
        return _PARSER.parse(content, env)
    finally:
        budget.spend(allowed - max(0, env["steps"]))


def outside_quotes(tokens: Iterable[Token]) -> Iterable[Sequence[Token]]:
    """The text of each block that is in no block quote, as tokens."""
    quotes = 0
    for token in tokens:
        if token.type == "blockquote_open":
            quotes += 1
        elif token.type == "blockquote_close":
            quotes -= 1
        elif token.type == "inline" and not quotes:
            yield token.children or ()
