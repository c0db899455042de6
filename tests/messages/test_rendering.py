"""What a message's content becomes in a page: the HTML that CommonMark says, and none that could do harm.

What could do harm is asked of an HTML parser, which builds the tree that a browser would, and not of a pattern.
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

from belfry.messages import markdown
from belfry.messages.mentions import EVERYONE, NO_MENTIONS, MentionedRole, MentionedUser, Mentions, find_mentions
from belfry.messages.rendering import HtmlCache, cache, page_budget, render, render_in_page
from tools.dev import ROOT

pytestmark = pytest.mark.slow

VECTORS: dict[str, list[str]] = json.loads((ROOT / "tests" / "data/xss_vectors.json").read_text())["vectors"]

ALLOWED: dict[str, dict[str, str]] = {
    **{name: {} for name in ("br", "hr", "em", "strong", "code", "pre", "ul", "li", "blockquote")},
    "p": {"class": r"heading-[1-6]"},
    "ol": {"start": r"[0-9]{1,9}"},
    "a": {"href": r"(?i:https?://|mailto:)[!-~]*", "rel": r"nofollow noopener noreferrer ugc"},
    "span": {"class": r"mention( me)?"},
}

PEOPLE = tuple(MentionedUser(at, name, True) for at, name in enumerate(("bob", "bob.smith", "a_b_c", "alice"), start=1))
MENTIONED = Mentions(PEOPLE, (MentionedRole(7, "vip"),), True, ())
NAMES = MENTIONED.names


def tree(html: str) -> Any:
    """As a browser has it, in a page's body. Fails where it would have to mend something."""
    parsed = JustHTML(html, fragment=True, sanitize=False, collect_errors=True)
    assert parsed.errors == [], html
    return parsed.root


def nodes(node: Any) -> Iterator[Any]:
    for child in node.children or ():
        yield child
        yield from nodes(child)


def check(html: str) -> None:
    """Only the allowed elements, with the allowed attributes, and nothing interactive inside of another."""
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


# -- What it looks like


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


def test_what_would_show_nothing_is_shown_as_it_was_written() -> None:
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


def test_no_mention_in_a_quote_or_in_code() -> None:
    assert mentions_in(render("> @bob\n\n```\n@bob\n```\n\n    @bob\n\n- @alice", MENTIONED)) == ["@alice"]


def test_what_calls_the_reader() -> None:
    assert body("@Bob @bob.smith @everyone", reader_names=frozenset({"bob", "everyone"})) == (
        '<span class="mention me">@Bob</span> <span class="mention">@bob.smith</span> '
        '<span class="mention me">@everyone</span>'
    )


def test_who_was_not_mentioned_is_not_marked() -> None:
    only_bob = Mentions(PEOPLE[:1], (), False, ())
    assert mentions_in(render("@bob @alice @vip @everyone", only_bob)) == ["@bob"]
    assert mentions_in(render("@bob")) == []


# -- Nothing that could do harm


PLACES = [
    *("…", "text …", "> …", "- …", "**…**", "# …", "`…", "```…\na\n```", "@…", "@bob…"),
    *("[…](http://b.example)", "[a](http://b.example/…)", "[a](…)", "[a](http://b.example '…')", "<http://b.example/…>"),
    *("![…](http://b.example)", "![a](http://b.example '…')", "[a]\n\n[a]: …", "[a]\n\n[a]: http://b.example '…'"),
]


@pytest.mark.parametrize("group", VECTORS)
def test_vectors(group: str) -> None:
    for vector in VECTORS[group]:
        for place in PLACES:
            check(render(place.replace("…", vector), MENTIONED, frozenset({"bob"})))


def test_vectors_outside_commonmark_are_shown_letter_by_letter() -> None:
    for group in ("element", "image and media", "link", "SVG, MathML and XML", "event handler"):
        for vector in VECTORS[group]:
            shown = text_of(render(f"`` {vector} ``"))
            assert shown.strip() == vector.replace("\n", " ").strip(), vector


def test_there_are_many_vectors() -> None:
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
def test_any_text_keeps_to_what_is_allowed(content: str) -> None:
    check(render(content, MENTIONED, frozenset({"bob"})))


@settings(deadline=None, max_examples=300)
@given(DANGEROUS)
def test_marking_mentions_changes_nothing_else(content: str) -> None:
    marked, plain = render(content, MENTIONED), render(content)
    assert re.sub(r'<span class="mention">|</span>', "", marked) == plain
    named = {name for candidate in find_mentions(content) for name in candidate.names}
    assert {mention[1:].lower() for mention in mentions_in(marked)} <= named & NAMES | {EVERYONE}
    assert bool(mentions_in(marked)) == bool(named & NAMES)


# -- Bounds


@pytest.mark.parametrize(
    "piece",
    [
        *("[", "![", "[[a](", "[*", "[a](b", "![a](", "[x]: y\n", "[x]\n", ">#\n;\n", ">>>>>>>>#\n;\n", "> - "),
        *("- a\n", "a\n", "#\n", "*a_ ", "**a", "`a", "<a", "<http://a> ", "&", "&quot;", '"', "\\@"),
        *("@bob ", "@a-", "@a_b_c"),
    ],
)
def test_no_text_takes_long(piece: str) -> None:
    content = (piece * 10_000)[:10_000]
    took = []
    for _ in range(3):
        began = time.process_time()
        html = render(content, MENTIONED)
        took.append(time.process_time() - began)
    assert min(took) < 0.5  # 0.08 s on the machine that it was written on
    assert isinstance(html, Markup)


def test_what_is_nested_too_deep_is_shown_as_it_was_written() -> None:
    for content in (">" * 60 + " deep", "- " * 30 + "deep", "> # a\n> b\n" * 10 + ">" * 60 + " deep\n\nafter"):
        html = render(content)
        check(html)
        assert text_of(html).strip().replace("\n\n", "\n") == content.replace("\n\n", "\n")
    assert render("- " * 15 + "deep").count("<ul>") == 15


def test_what_would_take_long_is_shown_as_it_was_written() -> None:
    content = "![" * 5_000
    assert render(content) == f"<p>{content}</p>\n"


HOSTILE = [">#\n;\n", "- a\n", "*a_ ", "[a](b ", "[a](b)", "\\@", "&amp;", "![![a](b", "[["]


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_page_of_hostile_messages_spends_no_more_than_its_budget(piece: str) -> None:
    short = "**gold** breaks out, @bob: [more](http://b.example)\n\n- a\n- b"
    budget = page_budget(50)
    for number in range(49):
        content = f"{number} {piece * 10_000}"[:10_000]
        render_in_page(content, MENTIONED, frozenset(), budget)
    assert budget.left >= 0
    assert render_in_page(short, MENTIONED, frozenset(), budget) == render(short, MENTIONED)  # each has its part


def test_what_people_write_takes_a_third_of_the_limit_at_most() -> None:
    line = "**BTC** broke 104,200 @bob, see [the chart](https://charts.example/btc?tf=4h) 🚀 比特币突破, `stop` below\n"
    for text in (line, f"- {line}", f"> {line}", f"1. {line}", f"{line}\n", f"| a | b |\n|---|---|\n{line}"):
        content = (text * 10_000)[:10_000]
        assert steps_of(content) < markdown.MAX_STEPS / 3, text
        assert len(render(content)) < 4 * len(content), text


@pytest.mark.parametrize("piece", ["- a\n", "#\n", "&", "*", "a\n", "1. a\n", "*-\n", "> x\n- y\n", "<a@b.c>", "[x]\n"])
def test_a_text_that_is_read_once_keeps_within_the_limit(piece: str) -> None:
    assert steps_of((piece * 10_000)[:10_000]) < markdown.MAX_STEPS


def calls_of(content: str) -> int:
    """How many Python functions parsing calls."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    traced = sys.getprofile()
    sys.setprofile(count)
    try:
        find_mentions(f"@bob {content}")
    finally:
        sys.setprofile(traced)
    return calls


@pytest.mark.parametrize("piece", ["![![a](b", "[", ">#\n;\n", "- a\n", "\n#"])
def test_a_crafted_text_costs_at_most_twice_what_the_longest_list_does(piece: str) -> None:
    assert calls_of((piece * 10_000)[:10_000]) < 80 * 10_000


@pytest.mark.parametrize("piece", ["![](", "[a](b", "![a](", "[a](\\((b", f"[x](a{'b' * 100}"])
def test_destinations_of_links_are_not_read_again_and_again(piece: str) -> None:
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
def test_destinations_with_brackets(content: str, target: str) -> None:
    assert body(content) == f'<a href="{escape(target)}" {REL}>a</a>'


def test_a_destination_whose_brackets_are_no_pairs_is_text() -> None:
    for content in ("[a](http://b.example/(c)", "[a]((((((b))))))", "[a](b c)"):
        assert body(content) == str(escape(content))


@pytest.mark.parametrize("piece", ["\n#", "[a]\n", "<a@b.c>", "[a](http://b)", "- \n", "@bob ", "&", "```\n", "[a] "])
def test_html_is_at_most_five_times_as_long_as_its_content(piece: str) -> None:
    for prefix in ("", f"[a]: http://b.example/{'c' * 5_000}\n\n"):  # to which every `[a]` links
        content = (prefix + piece * 10_000)[:10_000]
        assert len(render(content, MENTIONED)) <= 5 * len(content) + 1_000


def test_a_page_of_what_people_write_is_rendered_whole() -> None:
    honest = "**gold** breaks out, @bob: [more](http://b.example), and *silver*.\n\n- a\n- b\n\n> so it is\n" * 10
    budget = page_budget(50)
    for number in range(50):
        content = f"{number} {honest}"
        assert render_in_page(content, MENTIONED, frozenset(), budget) == render(content, MENTIONED)


# -- The cache


def in_page(
    content: str, mentioned: Mentions = NO_MENTIONS, reader_names: frozenset[str] = frozenset()
) -> tuple[str, int]:
    """The HTML on a page of its own, and how many steps of the page's budget it took."""
    budget = page_budget(1)
    before = budget.left
    return str(render_in_page(content, mentioned, reader_names, budget)), before - budget.left


def test_the_second_view_takes_no_steps() -> None:
    for content in ("**gold**, @bob", "![" * 5_000):
        first, steps = in_page(content)
        assert steps > 0
        assert in_page(content) == (first, 0)


def test_each_reader_sees_their_own_marks_and_each_version_its_own_text() -> None:
    only_bob = Mentions(PEOPLE[:1], (), False, ())
    for content in ("@bob @alice", "@bob @alice!"):
        for mentioned in (MENTIONED, only_bob, NO_MENTIONS):
            for reader_names in ({"bob"}, {"alice"}, {"alice", "vip"}, {"nobody"}):
                for _ in range(2):
                    html, _ = in_page(content, mentioned, frozenset(reader_names))
                    assert html == render(content, mentioned, frozenset(reader_names))


def test_readers_who_are_not_mentioned_share_an_entry() -> None:
    _, steps = in_page("@bob @alice", MENTIONED, frozenset({"carol"}))
    assert steps > 0
    assert in_page("@bob @alice", MENTIONED, frozenset({"dave", "gold"}))[1] == 0


def test_what_one_page_has_no_budget_for_the_next_page_renders() -> None:
    contents = [f"{number} {'- **a**' * 10}\n\n{'> # b' * 700}" + "*c* " * 1_500 for number in range(20)]
    whole = [str(render(content)) for content in contents]
    shown, views = [], 0
    while shown != whole:
        views += 1
        assert views < 20
        budget = page_budget(len(contents))
        shown = [str(render_in_page(content, NO_MENTIONS, frozenset(), budget)) for content in contents]
    assert views > 1


def test_the_cache_is_bounded_by_bytes_and_drops_what_was_used_least() -> None:
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
