"""Rendering of a message's content in a page: the HTML that CommonMark specifies, and no harmful HTML.

The tests check the tree that an HTML parser builds, which is the same as in a browser, and not the text.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from justhtml import JustHTML
from markupsafe import Markup, escape

from belfry.core import markdown
from belfry.messages.mentions import EVERYONE, NO_MENTIONS, MentionedRole, MentionedUser, Mentions, find_mentions
from belfry.messages.rendering import HtmlCache, cache, page_budget, render, render_in_page
from tools.dev import ROOT

pytestmark = pytest.mark.slow

VECTORS: dict[str, list[str]] = json.loads((ROOT / "tests" / "data/xss_vectors.json").read_text())["vectors"]

ALLOWED: dict[str, dict[str, str]] = {
    **{name: {} for name in ("br", "hr", "em", "strong", "s", "code", "pre", "ul", "li", "blockquote")},
    **{name: {} for name in ("table", "thead", "tbody", "tr", "th", "td")},
    "p": {"class": r"heading-[1-6]"},
    "ol": {"start": r"[0-9]{1,9}"},
    "a": {"href": r"(?i:https?://|mailto:)[!-~]*", "rel": r"nofollow noopener noreferrer ugc"},
    "span": {"class": r"mention( me)?"},
}

PEOPLE = tuple(MentionedUser(at, name, True) for at, name in enumerate(("bob", "bob.smith", "a_b_c", "alice"), start=1))
MENTIONED = Mentions(PEOPLE, (MentionedRole(7, "vip"),), True, ())
NAMES = MENTIONED.names


def tree(html: str) -> Any:
    """Parse HTML as a browser does in a page's body; fail if a browser would have to correct an error."""
    parsed = JustHTML(html, fragment=True, sanitize=False, collect_errors=True)
    assert parsed.errors == [], html
    return parsed.root


def nodes(node: Any) -> Iterator[Any]:
    for child in node.children or ():
        yield child
        yield from nodes(child)


def check(html: str) -> None:
    """Assert that only allowed elements and attributes occur, and no interactive element is inside another."""
    for node in nodes(tree(html)):
        if node.name == "#text":
            continue
        assert node.name in ALLOWED, html
        assert node.namespace == "html", html
        for name, value in node.attrs.items():
            assert re.fullmatch(ALLOWED[node.name].get(name, r"(?!)"), value), (name, value, html)
        if node.name == "a":
            assert node.attrs.keys() == {"href", "rel"}, html
            assert not [inner for inner in nodes(node) if inner.name == "a"], html
        if node.name == "span":
            assert [inner.name for inner in nodes(node)] == ["#text"], html


def text_of(html: str) -> str:
    return "".join(node.data for node in nodes(tree(html)) if node.name == "#text")


def mentions_in(html: str) -> list[str]:
    return [text_of(span) for span in re.findall(r"<span[^>]*>[^<]*</span>", html)]


def body(content: str, mentioned: Mentions = MENTIONED, reader_names: frozenset[str] = frozenset()) -> str:
    """The HTML of one paragraph, without its tags."""
    return str(render(content, mentioned, reader_names)).removeprefix("<p>").removesuffix("</p>\n")


@pytest.fixture(autouse=True)
def _empty_cache() -> None:
    cache.clear()


def steps_of(content: str) -> int:
    """The steps that parsing takes. Raises TooEntangled for more than MAX_STEPS."""
    budget = markdown.Budget(markdown.MAX_STEPS, 1)
    markdown.parse(content, budget)
    return markdown.MAX_STEPS - budget.left


REL = 'rel="nofollow noopener noreferrer ugc"'


# -- CommonMark and links


@pytest.mark.parametrize(
    ("content", "html"),
    [
        ("hello", "<p>hello</p>\n"),
        ("one\ntwo", "<p>one<br>\ntwo</p>\n"),
        ("one  \ntwo\\\nthree", "<p>one<br>\ntwo<br>\nthree</p>\n"),
        ("one\n\ntwo", "<p>one</p>\n<p>two</p>\n"),
        ("*a* **b** `c`", "<p><em>a</em> <strong>b</strong> <code>c</code></p>\n"),
        ("# a\n### b\nc\n===", '<p class="heading-1">a</p>\n<p class="heading-3">b</p>\n<p class="heading-1">c</p>\n'),
        ("- a\n- b", "<ul><li>a</li>\n<li>b</li>\n</ul>\n"),
        ("3. a\n\n4. b", '<ol start="3">\n<li><p>a</p>\n</li>\n<li><p>b</p>\n</li>\n</ol>\n'),
        ("1. a", "<ol><li>a</li>\n</ol>\n"),
        ("> a\n> b", "<blockquote><p>a<br>\nb</p>\n</blockquote>\n"),
        ("---", "<hr>\n"),
        ("```python\na < b\n```", "<pre><code>a &lt; b\n</code></pre>\n"),
        ("    a\n", "<pre><code>a\n</code></pre>\n"),
        ("<b>a</b> &amp; &lt;", "<p>&lt;b&gt;a&lt;/b&gt; &amp; &lt;</p>\n"),
        ("\\*a\\* &copy; \\@bob", "<p>*a* © @bob</p>\n"),
    ],
)
def test_commonmark(content: str, html: str) -> None:
    assert render(content) == html
    check(html)


@pytest.mark.parametrize(
    ("content", "html"),
    [
        ("[a](http://b.example/?c&d)", f'<a href="http://b.example/?c&amp;d" {REL}>a</a>'),
        ("[a](HTTPS://b.example 'title')", f'<a href="HTTPS://b.example" {REL}>a</a>'),
        ("<http://b.example>", f'<a href="http://b.example" {REL}>http://b.example</a>'),
        ("<b@c.example>", f'<a href="mailto:b@c.example" {REL}>b@c.example</a>'),
        ("[a][b]\n\n[b]: http://c.example", f'<a href="http://c.example" {REL}>a</a>'),
        ("[](http://b.example)", f'<a href="http://b.example" {REL}>http://b.example</a>'),
        ("![a *b*](http://c.example/d.png 'e')", f'<a href="http://c.example/d.png" {REL}>a b</a>'),
        ("![a\nb](http://c.example/d.png)", f'<a href="http://c.example/d.png" {REL}>a b</a>'),
        ("![](http://c.example/d.png)", f'<a href="http://c.example/d.png" {REL}>http://c.example/d.png</a>'),
        ("[![a](http://b.example)](http://c.example)", f'<a href="http://c.example" {REL}>a</a>'),
        ("![[a](http://b.example)](http://c.example)", f'<a href="http://c.example" {REL}>a</a>'),
        ("[a](ftp://b.example)", "a (ftp://b.example)"),
        ("[a](/settings)", "a (/settings)"),
        ("[a](//b.example)", "a (//b.example)"),
        ("[a](http:b)", "a (http:b)"),
        ("[a]()", "a"),
        ("[](tel:1)", "tel:1"),
        ("<ftp://b.example>", "ftp://b.example"),
        ("![a](b.png)", "a (b.png)"),
        ("[a](javascript:b)", "[a](javascript:b)"),
    ],
)
def test_links_and_images(content: str, html: str) -> None:
    assert body(content) == html
    check(html)


def test_content_that_renders_to_nothing_is_shown_as_source() -> None:
    assert render("[a]: <b>\n[c]: d") == "<p>[a]: &lt;b&gt;<br>\n[c]: d</p>\n"


# -- Mentions


@pytest.mark.parametrize(
    ("content", "html"),
    [
        ("hi @bob!", 'hi <span class="mention">@bob</span>!'),
        ("@Bob", '<span class="mention">@Bob</span>'),
        ("@bob.smith. @bob.jones", '<span class="mention">@bob.smith</span>. <span class="mention">@bob</span>.jones'),
        ("@bobby bob@bob.example", "@bobby bob@bob.example"),
        ("_@bob_", '<em><span class="mention">@bob</span></em>'),
        ("**@vip**", '<strong><span class="mention">@vip</span></strong>'),
        ("@a_b_c @a\\_b\\_c", '<span class="mention">@a_b_c</span> <span class="mention">@a_b_c</span>'),
        ("@everyone @carol", '<span class="mention">@everyone</span> @carol'),
        ("`@bob` \\@bob &#64;bob", "<code>@bob</code> @bob @bob"),
        ("[@bob](http://b.example)", f'<a href="http://b.example" {REL}><span class="mention">@bob</span></a>'),
        ("[b](http://b.example/@bob)", f'<a href="http://b.example/@bob" {REL}>b</a>'),
        ("<http://a.example/?@bob>", f'<a href="http://a.example/?@bob" {REL}>http://a.example/?@bob</a>'),
        ("![@bob](http://b.example)", f'<a href="http://b.example" {REL}><span class="mention">@bob</span></a>'),
        ("@bob\n@alice", '<span class="mention">@bob</span><br>\n<span class="mention">@alice</span>'),
    ],
)
def test_mentions(content: str, html: str) -> None:
    assert body(content) == html
    check(html)


def test_names_in_quotes_and_code_are_not_marked_as_mentions() -> None:
    assert mentions_in(render("> @bob\n\n```\n@bob\n```\n\n    @bob\n\n- @alice", MENTIONED)) == ["@alice"]


def test_mentions_of_the_reader_have_their_own_class() -> None:
    assert body("@Bob @bob.smith @everyone", reader_names=frozenset({"bob", "everyone"})) == (
        '<span class="mention me">@Bob</span> <span class="mention">@bob.smith</span> '
        '<span class="mention me">@everyone</span>'
    )


def test_names_that_are_not_mentioned_are_not_marked() -> None:
    only_bob = Mentions(PEOPLE[:1], (), False, ())
    assert mentions_in(render("@bob @alice @vip @everyone", only_bob)) == ["@bob"]
    assert mentions_in(render("@bob")) == []


# -- No harmful HTML


PLACES = [
    *("…", "text …", "> …", "- …", "**…**", "# …", "`…", "```…\na\n```", "@…", "@bob…"),
    *("[…](http://b.example)", "[a](http://b.example/…)", "[a](…)", "[a](http://b.example '…')", "<http://b.example/…>"),
    *("![…](http://b.example)", "![a](http://b.example '…')", "[a]\n\n[a]: …", "[a]\n\n[a]: http://b.example '…'"),
]


@pytest.mark.parametrize("group", VECTORS)
def test_xss_vectors_render_to_allowed_html(group: str) -> None:
    for vector in VECTORS[group]:
        for place in PLACES:
            check(render(place.replace("…", vector), MENTIONED, frozenset({"bob"})))


def test_xss_vectors_in_code_spans_are_shown_literally() -> None:
    for group in ("element", "image and media", "link", "SVG, MathML and XML", "event handler"):
        for vector in VECTORS[group]:
            shown = text_of(render(f"`` {vector} ``"))
            assert shown.strip() == vector.replace("\n", " ").strip(), vector


def test_the_vectors_are_complete() -> None:
    assert sum(len(vectors) for vectors in VECTORS.values()) > 500


DANGEROUS = st.lists(
    st.sampled_from(
        [
            *"<>\"'`=/()[]{}!&#;:@*_\\~|-+\n\t .,?%0a",
            *("<script", "</", "<!--", "-->", "<![CDATA[", "]]>", "<?", "<a href=", "<img src=x onerror=", "<svg"),
            *("javascript:", "data:", "vbscript:", "http://a", "https://b", "mailto:", "//c", "<http://", "](", "!["),
            *("&colon;", "&#58;", "&quot;", "&lt;", "&Tab;", "&#0;", "[x]: ", "[x]", '"onclick="', "' onclick='"),
            *("```", "~~~", "\n\n", "\n> ", "\n- ", "\n1. ", "    ", "# ", "@bob", "@a_b_c", "@everyone"),
            *("\u202e", "\u2028", "\ufeff", "\x0c", "\x01", "é"),
        ]
    ),
    max_size=40,
).map("".join)


@settings(deadline=None, max_examples=400)
@given(DANGEROUS | st.text(max_size=200))
def test_any_text_renders_to_allowed_html(content: str) -> None:
    check(render(content, MENTIONED, frozenset({"bob"})))


@settings(deadline=None, max_examples=300)
@given(DANGEROUS)
def test_marking_mentions_changes_no_other_html(content: str) -> None:
    marked, plain = render(content, MENTIONED), render(content)
    assert re.sub(r'<span class="mention">|</span>', "", marked) == plain
    named = {name for candidate in find_mentions(content) for name in candidate.names}
    assert {mention[1:].lower() for mention in mentions_in(marked)} <= named & NAMES | {EVERYONE}
    assert bool(mentions_in(marked)) == bool(named & NAMES)


# -- Limits


@pytest.mark.parametrize(
    "piece",
    [
        *("[", "![", "[[a](", "[*", "[a](b", "![a](", "[x]: y\n", "[x]\n", ">#\n;\n", ">>>>>>>>#\n;\n", "> - "),
        *("- a\n", "a\n", "#\n", "*a_ ", "**a", "`a", "<a", "<http://a> ", "&", "&quot;", '"', "\\@"),
        *("@bob ", "@a-", "@a_b_c"),
    ],
)
def test_any_text_is_rendered_in_half_a_second(piece: str) -> None:
    content = (piece * 10_000)[:10_000]
    durations = []
    for _ in range(3):
        started = time.process_time()
        html = render(content, MENTIONED)
        durations.append(time.process_time() - started)
    assert min(durations) < 0.5  # a typical machine takes 0.08 s
    assert isinstance(html, Markup)


def test_content_that_is_nested_too_deeply_is_shown_as_source() -> None:
    for content in (">" * 60 + " deep", "- " * 30 + "deep", "> # a\n> b\n" * 10 + ">" * 60 + " deep\n\nafter"):
        html = render(content)
        check(html)
        assert text_of(html).strip().replace("\n\n", "\n") == content.replace("\n\n", "\n")
    assert render("- " * 15 + "deep").count("<ul>") == 15


def test_content_that_takes_too_many_steps_is_shown_as_source() -> None:
    content = "![" * 5_000
    assert render(content) == f"<p>{content}</p>\n"


HOSTILE = [">#\n;\n", "- a\n", "*a_ ", "[a](b ", "[a](b)", "\\@", "&amp;", "![![a](b", "[["]


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_page_of_hostile_messages_stays_within_its_budget(piece: str) -> None:
    short = "**gold** breaks out, @bob: [more](http://b.example)\n\n- a\n- b"
    budget = page_budget(50)
    for number in range(49):
        content = f"{number} {piece * 10_000}"[:10_000]
        render_in_page(content, MENTIONED, frozenset(), budget)
    assert budget.left >= 0
    assert render_in_page(short, MENTIONED, frozenset(), budget) == render(short, MENTIONED)  # its own share


def test_ordinary_text_takes_at_most_a_third_of_the_step_limit() -> None:
    line = "**BTC** broke 104,200 @bob, see [the chart](https://charts.example/btc?tf=4h) 🚀 比特币突破, `stop` below\n"
    for text in (line, f"- {line}", f"> {line}", f"1. {line}", f"{line}\n", f"| a | b |\n|---|---|\n{line}"):
        content = (text * 10_000)[:10_000]
        assert steps_of(content) < markdown.MAX_STEPS / 3, text
        assert len(render(content)) < 4 * len(content), text


@pytest.mark.parametrize("piece", ["- a\n", "#\n", "&", "*", "a\n", "1. a\n", "*-\n", "> x\n- y\n", "<a@b.c>", "[x]\n"])
def test_text_that_is_parsed_in_one_pass_stays_within_the_step_limit(piece: str) -> None:
    assert steps_of((piece * 10_000)[:10_000]) < markdown.MAX_STEPS


def calls_of(content: str) -> int:
    """The number of Python function calls that parsing takes."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        find_mentions(f"@bob {content}")
    finally:
        sys.setprofile(previous)
    return calls


@pytest.mark.parametrize("piece", ["![![a](b", "[", ">#\n;\n", "- a\n", "\n#"])
def test_a_hostile_text_takes_at_most_twice_the_calls_of_the_longest_list(piece: str) -> None:
    assert calls_of((piece * 10_000)[:10_000]) < 80 * 10_000


@pytest.mark.parametrize("piece", ["![](", "[a](b", "![a](", "[a](\\((b", f"[x](a{'b' * 100}"])
def test_link_destinations_are_parsed_in_linear_time(piece: str) -> None:
    content = (piece * 10_000)[:9_000]
    assert calls_of(content) < 20 * len(content)


@pytest.mark.parametrize(
    ("content", "target"),
    [
        ("[a](http://b.example/(c(d(e))))", "http://b.example/(c(d(e)))"),
        ("[a](http://b.example/\\(c)", "http://b.example/(c"),
        ("[a](http://b.example/c\\)d)", "http://b.example/c)d"),
        ("[a](http://b.example/c\\d)", "http://b.example/c%5Cd"),
        ("[a](<http://b.example/(c> 'd')", "http://b.example/(c"),
        ("[a](http://b.example/(c)d(e) 'f')", "http://b.example/(c)d(e)"),
    ],
)
def test_link_destinations_can_contain_parentheses(content: str, target: str) -> None:
    assert body(content) == f'<a href="{escape(target)}" {REL}>a</a>'


def test_a_destination_with_unbalanced_parentheses_is_text() -> None:
    for content in ("[a](/b.example/(c)", "[a]((((((b))))))", "[a](b c)"):
        assert body(content) == str(escape(content))


@pytest.mark.parametrize("piece", ["\n#", "[a]\n", "<a@b.c>", "[a](http://b)", "- \n", "@bob ", "&", "```\n", "[a] "])
def test_html_is_at_most_five_times_as_long_as_its_content(piece: str) -> None:
    for prefix in ("", f"[a]: http://b.example/{'c' * 5_000}\n\n"):  # the target of every `[a]`
        content = (prefix + piece * 10_000)[:10_000]
        assert len(render(content, MENTIONED)) <= 5 * len(content) + 1_000


def test_a_page_of_ordinary_messages_is_rendered_completely() -> None:
    honest = "**gold** breaks out, @bob: [more](http://b.example), and *silver*.\n\n- a\n- b\n\n> so it is\n" * 10
    budget = page_budget(50)
    for number in range(50):
        content = f"{number} {honest}"
        assert render_in_page(content, MENTIONED, frozenset(), budget) == render(content, MENTIONED)


# -- The cache


def in_page(
    content: str, mentioned: Mentions = NO_MENTIONS, reader_names: frozenset[str] = frozenset()
) -> tuple[str, int]:
    """Render the content on a separate page; return the HTML and the steps of the page's budget that it took."""
    budget = page_budget(1)
    before = budget.left
    return str(render_in_page(content, mentioned, reader_names, budget)), before - budget.left


def test_a_cached_message_takes_no_steps() -> None:
    for content in ("**gold**, @bob", "![" * 5_000):
        first, steps = in_page(content)
        assert steps > 0
        assert in_page(content) == (first, 0)


def test_the_cache_distinguishes_readers_mentions_and_versions() -> None:
    only_bob = Mentions(PEOPLE[:1], (), False, ())
    for content in ("@bob @alice", "@bob @alice!"):
        for mentioned in (MENTIONED, only_bob, NO_MENTIONS):
            for reader_names in ({"bob"}, {"alice"}, {"alice", "vip"}, {"nobody"}):
                for _ in range(2):
                    html, _ = in_page(content, mentioned, frozenset(reader_names))
                    assert html == render(content, mentioned, frozenset(reader_names))


def test_readers_who_are_not_mentioned_share_a_cache_entry() -> None:
    _, steps = in_page("@bob @alice", MENTIONED, frozenset({"carol"}))
    assert steps > 0
    assert in_page("@bob @alice", MENTIONED, frozenset({"dave", "gold"}))[1] == 0


def test_messages_beyond_the_budget_of_one_page_are_rendered_by_later_pages() -> None:
    contents = [f"{number} {'- **a**' * 10}\n\n{'> # b' * 700}" + "*c* " * 1_500 for number in range(20)]
    whole = [str(render(content)) for content in contents]
    shown, views = [], 0
    while shown != whole:
        views += 1
        assert views < 20
        budget = page_budget(len(contents))
        shown = [str(render_in_page(content, NO_MENTIONS, frozenset(), budget)) for content in contents]
    assert views > 1


def test_the_cache_is_limited_in_bytes_and_drops_the_least_recently_used_entry() -> None:
    small = HtmlCache(100_000)
    for number in range(1_000):
        small.put(number.to_bytes(32, "big"), Markup("é" * number))
        assert small.get(bytes(32)) == ""
        assert small.bytes <= 100_000
    assert small.get((1).to_bytes(32, "big")) is None
    assert small.get((999).to_bytes(32, "big")) == "é" * 999
    small.put(b"large", Markup("x" * 200_000))
    assert small.get(b"large") is None
    assert small.bytes <= 100_000
