"""A drill: the cost of parsing and rendering ordinary messages, and messages crafted to be expensive."""

import json
import re
import statistics
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.cookiejar import CookieJar
from importlib import metadata
from typing import Any

from tools.dev import ROOT
from tools.dev.harness import Harness

LENGTH = 10_000  # characters, the longest message
VIEWS = 80  # for the last 20, everything is in the cache of each web process

_POST = """**BTC/USD** broke 104,200 \U0001f680 @sam_{n} see [the chart](https://charts.example.com/btc?tf=4h&n={n})

1. entry `104150.5`, stop *below* 103,900
2. target __105,400__: 比特币突破前高,注意回调风险
   - half at 104,800
   - rest trails by 0.5 %

> {n}: so far it only *looks* like a breakout

| pair | last | change |
|---|---|---|
| ETH | 3,980 | +1.2 % |

```
if close > high[{n}]: buy(1)
```

"""
CRAFTED = {
    "![![a](b": "nested images without an end",
    "![![](](": "images whose destinations have no end",
    "![](": "destinations without an end",
    "[": "brackets without an end",
    ">#\n;\n": "block quotes, each searched again",
    "- a\n": "items of a list",
    "\n#": "empty headings",
    "*a_ ": "emphasis without an end",
    "<a@b.c>": "autolinks",
    "&": "characters to be escaped",
    "[a]\n": "links to one long address",
}


def rendering(harness: Harness, members: int, posts: int) -> dict[str, Any]:
    """Parser steps of ordinary texts; steps, milliseconds and HTML of crafted ones; a page of 50, and a post."""
    figures = {**_ordinary(), **_crafted()}
    for piece in ("", "![![a](b", "[a]\n"):
        figures |= _page(harness, piece)
    return {**figures, **_many_names(harness)}


def crafted(piece: str, number: int = 0) -> str:
    """Return a message of LENGTH that repeats a piece; the number makes it unique."""
    start = f"[a]: http://b.example/{'c' * 5_000}\n\n" if piece == "[a]\n" else ""
    return f"{number} @sam\n\n{start}{piece * LENGTH}"[:LENGTH].strip()


def ordinary() -> list[str]:
    """Return the README files of the installed packages and the texts of the tests, in pieces, and long posts."""
    texts = [str(one.metadata.get_payload() or one.metadata.get("Description")) for one in metadata.distributions()]
    data = ROOT / "tests" / "data"
    texts += [case["content"] for case in json.loads((data / "mention_cases.json").read_text())]
    texts += ["".join(_POST.format(n=number) for number in range(30))]
    texts += [(line * LENGTH)[:LENGTH] for line in _POST.format(n=1).split("\n\n")]
    return [text[at : at + LENGTH].strip() for text in texts for at in range(0, len(text), LENGTH)]


def steps_of(content: str) -> int:
    """Return the steps that parsing takes: MAX_STEPS where the parser stops."""
    from belfry.core import markdown

    budget = markdown.Budget(markdown.MAX_STEPS, 1)
    try:
        markdown.parse(content, budget=budget)
    except markdown.ParseBudgetExceeded:
        return markdown.MAX_STEPS
    return markdown.MAX_STEPS - budget.left


def _ordinary() -> dict[str, Any]:
    from belfry.messages.rendering import render

    texts = [text for text in ordinary() if text]
    steps = sorted(steps_of(text) for text in texts)
    growth = sorted(len(render(text)) / len(text) for text in texts if len(text) > 1_000)
    return {
        "ordinary_texts": len(texts),
        "ordinary_steps_p50": steps[len(steps) // 2],
        "ordinary_steps_p95": steps[len(steps) * 95 // 100],
        "ordinary_steps_max": steps[-1],
        "ordinary_html_growth_p50": round(growth[len(growth) // 2], 2),
        "ordinary_html_growth_max": round(growth[-1], 2),
    }


def _crafted() -> dict[str, Any]:
    from belfry.messages.mentions import find_mentions
    from belfry.messages.rendering import render

    figures = {}
    for piece, about in CRAFTED.items():
        content = crafted(piece)
        figures[f"{about}: steps, mentions ms, rendering ms, HTML"] = (
            f"{steps_of(content):,}, {_milliseconds(find_mentions, content)}, {_milliseconds(render, content)}, "
            f"{len(render(content).encode()):,} bytes"
        )
    return figures


def _milliseconds(function: Callable[[str], Any], content: str) -> int:
    """Return the CPU time, the shortest of three."""
    took = []
    for _ in range(3):
        began = time.process_time()
        function(content)
        took.append(time.process_time() - began)
    return round(min(took) * 1000)


def _page(harness: Harness, piece: str) -> dict[str, Any]:
    """Request the page of a channel with 50 crafted messages VIEWS times: the first, the slowest, and the last 20."""
    server = harness.create_server(3)
    channel_id = server["channel_ids"][0]
    for number in range(50 if piece else 0):
        harness.post(channel_id, crafted(piece, number))
    view = _sign_in(harness)
    path = f"/servers/{server['server_id']}/channels/{channel_id}"
    took, sizes = [], []
    for _ in range(VIEWS):
        began = time.perf_counter()
        sizes.append(len(view(path)))
        took.append((time.perf_counter() - began) * 1000)
    about = f"page of 50 times {piece!r}" if piece else "page without messages"
    return {
        f"{about}: first ms, max ms, p50 ms of the last 20, bytes at most": (
            f"{took[0]:.0f}, {max(took):.0f}, {statistics.median(took[-20:]):.1f}, {max(sizes):,}"
        )
    }


def _sign_in(harness: Harness) -> Callable[[str], bytes]:
    """Sign in; returns a function that requests a path."""
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(CookieJar())
    )

    def get(path: str, form: dict[str, str] | None = None) -> bytes:
        data = urllib.parse.urlencode(form).encode() if form else None
        with opener.open(harness.address + path, data, timeout=60) as answer:
            body: bytes = answer.read()
        return body

    found = re.search(rb'name="csrf" value="([^"]+)"', get("/login"))
    assert found
    get("/login", {"csrf": found[1].decode(), "token": harness.client.token})
    return get


def _many_names(harness: Harness) -> dict[str, Any]:
    """Post messages that mention unknown names: the time, and the size of the response."""
    channel_id = harness.create_server(3)["channel_ids"][0]
    took, size = [], 0
    for number in range(10):
        content = " ".join(f"@{name:04}" for name in range(number, number + 1_660))
        began = time.perf_counter()
        size = len(json.dumps(harness.post(channel_id, content), ensure_ascii=False).encode())
        took.append((time.perf_counter() - began) * 1000)
    return {"post of 1,660 unknown names: p50 ms, bytes of the response": f"{statistics.median(took):.0f}, {size:,}"}
