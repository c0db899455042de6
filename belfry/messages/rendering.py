"""Render a message's content as HTML that is safe to put into a page."""

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from itertools import accumulate

from markdown_it.token import Token
from markupsafe import Markup, escape

from belfry.core import markdown
from belfry.messages import mentions
from belfry.messages.mentions import NO_MENTIONS, Mentions

_PAGE_STEPS = 2 * markdown.MAX_STEPS  # for all messages of a page that are not in the cache

# The HTML has at most this many characters for each of the content's, and some more. Escaping alone can take five
# (`&` is `&amp;`), `#` in each line thirteen, and links to one long address a thousand.
_MAX_GROWTH = 5
_FREE_CHARACTERS = 1_000

_CACHE_BYTES = 16 * 1024 * 1024  # in each process

_SCHEMES = ("http://", "https://", "mailto:")
_REL = "nofollow noopener noreferrer ugc"

# All possible elements beside `a` and `span`. No other element gets into a page.
_BLOCKS = {
    "paragraph": "p",
    "blockquote": "blockquote",
    "bullet_list": "ul",
    "ordered_list": "ol",
    "list_item": "li",
    "table": "table",
    "thead": "thead",
    "tbody": "tbody",
    "tr": "tr",
    "th": "th",
    "td": "td",
}
_TAGS = {
    "softbreak": "<br>\n",
    "hardbreak": "<br>\n",
    "em_open": "<em>",
    "em_close": "</em>",
    "strong_open": "<strong>",
    "strong_close": "</strong>",
    "s_open": "<s>",
    "s_close": "</s>",
}

Marks = dict[int, list[tuple[int, str]]]  # {id of a text token: tags, and the character before which each stands}


class HtmlCache:
    """HTML by a digest of everything that it depends on, so that no entry is ever out of date.

    Uses at most `max_bytes` of memory, and drops the entries that were not used for the longest time. Thread-safe.
    """

    _ENTRY_BYTES = 250  # for the key and the dictionary's entry

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
        """Add an entry; an existing one stays. An entry larger than the cache is not added."""
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
    """A budget for rendering this number of messages of one page."""
    return markdown.Budget(_PAGE_STEPS, messages)


def render_in_page(content: str, mentioned: Mentions, reader_names: Set[str], budget: markdown.Budget) -> Markup:
    """Render as `render` does, from the cache where possible, which does not use the page's budget.

    Where the budget is spent the content is shown as plain text. That is not cached, so another page may render it.
    """
    names = mentioned.names
    key = _key(content, names, reader_names & names)
    html = cache.get(key)
    if html is not None:
        budget.take(0)
        return html
    try:
        html = _render(content, names, reader_names, budget)
    except markdown.BudgetSpent:
        return _plain_text(content)
    except markdown.ParseBudgetExceeded:
        html = _plain_text(content)
    cache.put(key, html)
    return html


def _key(content: str, names: Set[str], reader_names: Set[str]) -> bytes:
    """A digest of the arguments. Names contain no comma and no line break."""
    text = f"{','.join(sorted(names))}\n{','.join(sorted(reader_names))}\n{content}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def render(content: str, mentioned: Mentions = NO_MENTIONS, reader_names: Set[str] = frozenset()) -> Markup:
    """Render content, read as CommonMark, as HTML. Never raises.

    `reader_names` are the names that mention the reader, in lower case: their username, and if the caller wants, their
    roles and `everyone`.

    - Elements are p, br, hr, em, strong, s, code, pre, ul, ol, li, blockquote, table, thead, tbody, tr, th, td, a and
      span. Tags in the content are text.
    - A line's end is a line break, as in other chats.
    - A heading is `<p class="heading-1">` to `-6`, because headings belong to the page's outline.
    - A link's target is http, https or mailto, with `rel="nofollow noopener noreferrer ugc"`. For any other target the
      label is shown with the target in brackets, as text. A link's title is not shown.
    - A bare `http://` or `https://` URL is a link to itself.
    - An image is a link to it with its description as the label: nothing is loaded from elsewhere.
    - A mention of `mentioned` is in `<span class="mention">`, one of the reader in `<span class="mention me">`.
    - There are no other attributes but the number that a list starts with; only `href` has a value from the content.
    - Plain text is shown for content that takes more than `markdown.MAX_STEPS`, is nested so deep that parts would be
      left out, would show nothing (a link's definition alone), or would be more than `_MAX_GROWTH` times as long.
    """
    try:
        return _render(content, mentioned.names, reader_names)
    except markdown.ParseBudgetExceeded:
        return _plain_text(content)


def _render(content: str, names: Set[str], reader_names: Set[str], budget: markdown.Budget | None = None) -> Markup:
    """Render as `render` does. Raises what `markdown.parse` raises."""
    tokens = markdown.parse(content, budget)
    if any(token.level >= markdown.MAX_NESTING - 1 and token.nesting == 1 for token in tokens):
        return _plain_text(content)
    parts, left = [], _MAX_GROWTH * len(content) + _FREE_CHARACTERS
    for part in _blocks(tokens, _marks(tokens, names, reader_names)):
        left -= len(part)
        if left < 0:
            return _plain_text(content)
        parts.append(part)
    html = "".join(parts)
    return Markup(html) if html else _plain_text(content)  # noqa: S704  # every piece of it is escaped or ours


def _plain_text(content: str) -> Markup:
    return Markup("<p>") + Markup("<br>\n").join(content.split("\n")) + Markup("</p>\n")


def _marks(tokens: Sequence[Token], names: Set[str], reader_names: Set[str]) -> Marks:
    """The tags around the mentions. A mention lies in one text token or in several adjacent ones."""
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
                (start, f'<span class="mention{" me" if name in reader_names else ""}">'),
                (start + len(name), "</span>"),  # its last character; the tag follows it
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
        elif token.hidden:  # a paragraph of a list without empty lines
            continue
        elif kind == "heading":
            yield f'<p class="heading-{int(token.tag[1:])}">' if side == "open" else "</p>\n"
        elif token.type == "ordered_list_open" and (first := token.attrGet("start")) is not None:
            yield f'<ol start="{int(first)}">\n'
        else:
            yield f"<{_BLOCKS[kind]}>" if side == "open" else f"</{_BLOCKS[kind]}>\n"


def _inline(tokens: Sequence[Token], marks: Marks) -> Iterator[str]:
    target, label = None, ""  # of the open link
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
    """A link; where the target is not allowed, its label, with the target unless that is its `own` label."""
    if not label.strip():
        label, own = str(escape(target)), True
    if target.lower().startswith(_SCHEMES):
        return f'<a href="{escape(target)}" rel="{_REL}">{label}</a>'
    return label if own or not target else f"{label} ({escape(target)})"


def _description(tokens: Sequence[Token], marks: Marks) -> str:
    """The description of an image, without markup."""
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
    """A token's text with its mentions in tags; empty for markup."""
    parts, at = [], 0
    for offset, tag in marks.get(id(token), ()):
        parts += [str(escape(token.content[at:offset])), tag]
        at = offset
    return "".join((*parts, str(escape(token.content[at:]))))
