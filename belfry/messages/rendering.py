"""A message's content as HTML that is safe to put into a page."""

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from itertools import accumulate

from markdown_it.token import Token
from markupsafe import Markup, escape

from belfry.messages import markdown, mentions
from belfry.messages.mentions import NO_MENTIONS, Mentions

_PAGE_STEPS = 2 * markdown.MAX_STEPS  # for all messages of a page that are not in the cache

# HTML has at most this many characters for each of the content's, and some more. Escaping alone can take five for one
# (`&` is `&amp;`); `#` in each line takes thirteen, and links to one long address can take a thousand.
_MAX_GROWTH = 5
_FREE_CHARACTERS = 1_000

_CACHE_BYTES = 16 * 1024 * 1024  # in each process

_SCHEMES = ("http://", "https://", "mailto:")
_REL = "nofollow noopener noreferrer ugc"

# All the elements that there can be, beside `a` and `span`: what is not here has no way into a page.
_BLOCKS = {
    "paragraph": "p",
    "blockquote": "blockquote",
    "bullet_list": "ul",
    "ordered_list": "ol",
    "list_item": "li",
}
_TAGS = {
    "softbreak": "<br>\n",
    "hardbreak": "<br>\n",
    "em_open": "<em>",
    "em_close": "</em>",
    "strong_open": "<strong>",
    "strong_close": "</strong>",
}

Marks = dict[int, list[tuple[int, str]]]  # by id of a token of text: tags, and before which of its characters


class HtmlCache:
    """HTML by a digest of everything that it depends on, so that no entry is ever out of date.

    Holds at most `max_bytes` of memory and drops what was not used for the longest time. Safe for use by threads.
    """

    _ENTRY_BYTES = 250  # for the key, and for the entry in the dictionary

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, Markup] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes = 0

    def get(self, key: bytes) -> Markup | None:
        with self._lock:
            if (html := self._entries.get(key)) is not None:
                self._entries.move_to_end(key)
            return html

    def put(self, key: bytes, html: Markup) -> None:
        """Keep an entry; one that is there already stays. One that is larger than the cache is not kept."""
        with self._lock:
            if key in self._entries:
                return
            self._entries[key] = html
            self.bytes += self._size(html)
            while self.bytes > self._max_bytes:
                _, oldest = self._entries.popitem(last=False)
                self.bytes -= self._size(oldest)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def _size(self, html: Markup) -> int:
        return sys.getsizeof(html) + self._ENTRY_BYTES


cache = HtmlCache(_CACHE_BYTES)


def page_budget(messages: int) -> markdown.Budget:
    """For rendering so many messages of one page."""
    return markdown.Budget(_PAGE_STEPS, messages)


def render_in_page(content: str, mentioned: Mentions, mine: Set[str], budget: markdown.Budget) -> Markup:
    """Render as `render` does, from the cache where it can, which takes nothing of the page's budget.

    Where the budget is spent the content is shown as it was written. That is not kept: the next page renders it.
    """
    names = mentioned.names
    key = _key(content, names, mine & names)
    html = cache.get(key)
    if html is not None:
        budget.take(0)
        return html
    try:
        html = _render(content, names, mine, budget)
    except markdown.BudgetSpent:
        return _plain_text(content)
    except markdown.ParseBudgetExceeded:
        html = _plain_text(content)
    cache.put(key, html)
    return html


def _key(content: str, names: Set[str], mine: Set[str]) -> bytes:
    """A digest of the arguments. No name has a comma or a line break in it."""
    text = f"{','.join(sorted(names))}\n{','.join(sorted(mine))}\n{content}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def render(content: str, mentioned: Mentions = NO_MENTIONS, mine: Set[str] = frozenset()) -> Markup:
    """The content, read as CommonMark, as HTML. `mine` is what an `@` calls the reader by, in lower case: their
    username, and where the caller wishes the roles that they have, and `everyone`. Never raises.

    - Elements are p, br, hr, em, strong, code, pre, ul, ol, li, blockquote, a and span. Tags in the content are text.
    - A line's end is a line break, as one expects of a chat.
    - A heading is `<p class="heading-1">` to `-6`: it is a page's outline that headings are for, and no message's.
    - A link leads to http, https or mailto, and says `rel="nofollow noopener noreferrer ugc"`. Of any other the
      label is shown with the target in brackets, as text. A link's title is not shown.
    - An image is a link to it with its description as the label: nothing is loaded from elsewhere.
    - What of the text counts as a mention, as `find_mentions` has it, and is among `mentioned`, is in
      `<span class="mention">`, and what calls the reader in `<span class="mention me">`.
    - No other attribute exists but the number that a list starts with; none but `href` has anything of the content's.
    - Shown as it was written is what takes more than `markdown.MAX_STEPS` to read, what is nested so deep that the
      deepest would be left out, what would show nothing, such as a link's definition alone, and what would be more
      than `_MAX_GROWTH` times as long as HTML.
    """
    try:
        return _render(content, mentioned.names, mine)
    except markdown.ParseBudgetExceeded:
        return _plain_text(content)


def _render(content: str, names: Set[str], mine: Set[str], budget: markdown.Budget | None = None) -> Markup:
    """Render as `render` does. Raises what `markdown.parse` raises."""
    tokens = markdown.parse(content, budget)
    if any(token.level >= markdown.MAX_NESTING - 1 and token.nesting == 1 for token in tokens):
        return _plain_text(content)
    parts, left = [], _MAX_GROWTH * len(content) + _FREE_CHARACTERS
    for part in _blocks(tokens, _marks(tokens, names, mine)):
        left -= len(part)
        if left < 0:
            return _plain_text(content)
        parts.append(part)
    html = "".join(parts)
    return Markup(html) if html else _plain_text(content)  # noqa: S704  # every piece of it is escaped or ours


def _plain_text(content: str) -> Markup:
    return Markup("<p>") + Markup("<br>\n").join(content.split("\n")) + Markup("</p>\n")


def _marks(tokens: Sequence[Token], names: Set[str], mine: Set[str]) -> Marks:
    """The tags around the mentions. A mention lies in one token, or in several that are all of text."""
    marks: Marks = {}
    if not names:
        return marks
    for children in markdown.tokens_outside_quotes(tokens):
        parts = list(mentions.tokens_with_text(children))
        ends = list(accumulate(len(text) for _, text in parts))
        at = 0
        for start, candidate in mentions.candidates_in("".join(text for _, text in parts)):
            name = next((name for name in candidate.names if name in names), None)
            if name is None:
                continue
            for position, tag in (
                (start, f'<span class="mention{" me" if name in mine else ""}">'),
                (start + len(name), "</span>"),  # its last character, and the tag comes after it
            ):
                while ends[at] <= position:
                    at += 1
                token, text = parts[at]
                offset = position - (ends[at] - len(text)) + (tag == "</span>")
                marks.setdefault(id(token), []).append((offset, tag))
    return marks


def _blocks(tokens: Sequence[Token], marks: Marks) -> Iterator[str]:
    for token in tokens:
        kind, _, side = token.type.rpartition("_")
        if token.type == "inline":
            yield from _inline(token.children or (), marks)
        elif token.type in ("fence", "code_block"):
            yield f"<pre><code>{escape(token.content)}</code></pre>\n"
        elif token.type == "hr":
            yield "<hr>\n"
        elif token.hidden:  # a paragraph of a list whose items are close together
            continue
        elif kind == "heading":
            yield f'<p class="heading-{int(token.tag[1:])}">' if side == "open" else "</p>\n"
        elif token.type == "ordered_list_open" and (first := token.attrGet("start")) is not None:
            yield f'<ol start="{int(first)}">\n'
        else:
            yield f"<{_BLOCKS[kind]}>" if side == "open" else f"</{_BLOCKS[kind]}>\n"


def _inline(tokens: Sequence[Token], marks: Marks) -> Iterator[str]:
    target, label = None, ""  # of the link that we are in
    for token in tokens:
        if token.type == "link_open":
            target, label = str(token.attrGet("href") or ""), ""
            continue
        if token.type == "link_close":
            yield _link(target or "", label, own=token.info == "auto")
            target = None
            continue
        if token.type == "image":
            source, description = str(token.attrGet("src") or ""), _description(token.children or (), marks)
            html = description if target is not None else _link(source, description)
        elif token.type == "code_inline":
            html = f"<code>{escape(token.content)}</code>"
        else:
            html = _TAGS[token.type] if token.type in _TAGS else _text(token, marks)
        if target is None:
            yield html
        else:
            label += html


def _link(target: str, label: str, *, own: bool = False) -> str:
    """A link, or where it may not be one its label, with the target unless that is its `own` label."""
    if not label.strip():
        label, own = str(escape(target)), True
    if target.lower().startswith(_SCHEMES):
        return f'<a href="{escape(target)}" rel="{_REL}">{label}</a>'
    return label if own or not target else f"{label} ({escape(target)})"


def _description(tokens: Sequence[Token], marks: Marks) -> str:
    """An image's, without the markup in it."""
    parts = []
    for token in tokens:
        if token.type == "image":
            parts.append(_description(token.children or (), marks))
        elif token.type in ("softbreak", "hardbreak"):
            parts.append(" ")
        else:
            parts.append(_text(token, marks))
    return "".join(parts)


def _text(token: Token, marks: Marks) -> str:
    """A token's text with its mentions in their tags; empty for one of markup."""
    parts, at = [], 0
    for offset, tag in marks.get(id(token), ()):
        parts += [str(escape(token.content[at:offset])), tag]
        at = offset
    return "".join((*parts, str(escape(token.content[at:]))))
