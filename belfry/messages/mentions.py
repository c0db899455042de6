"""Find and resolve the mentions of a message.

Reading the text (`find_mentions`) and resolving its names (`resolve`) are separate steps: the caller looks
`possible_names` up in between. Nothing here uses the database.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markdown_it.token import Token

from belfry.core import markdown
from belfry.core.errors import truncate

EVERYONE = "everyone"

# A whole valid username or role name, in lower case. It ends in a letter or a digit, because trailing `. - _` belong
# to the sentence: a name that ends in one could never be mentioned, so it is refused
# when it is created.
SHORTEST, LONGEST = 3, 32
NAME = re.compile(rf"\A[a-z0-9][a-z0-9_.-]{{{SHORTEST - 2},{LONGEST - 2}}}[a-z0-9]\Z")
NAME_RULE = (
    "3 to 32 of a-z 0-9 _ . - that begin and end with a letter or digit "
    "(a last . - _ could never be mentioned), and not 'everyone'"
)

UNKNOWN = "unknown_mention"
WITHOUT_ACCESS = "mention_without_access"
NOT_ALLOWED = "mention_not_allowed"
NOT_READ = "mentions_not_read"
MORE_WARNINGS = "more_warnings"

MAX_WARNINGS = 20
_WARNING_CHARACTERS = 64  # that a warning quotes: a name may be as long as the content

# `re.IGNORECASE` matches the Kelvin sign and the long s, so the classes are spelled out.
_MENTION = re.compile(r"(?:\A|(?<=[\s'\"(\[{/<>*_~|]))@(?P<run>[A-Za-z0-9][A-Za-z0-9_.-]*)")
_PUNCTUATION = "._-"
_REST_OF_ADDRESS = re.compile(r"@[A-Za-z0-9-]+\.[A-Za-z0-9]")

# Stands for an `@` that is not one, and for all markup that may not precede a mention or continue a name.
_BOUNDARY = "`"
_MARKUP = {
    "softbreak": "\n",
    "hardbreak": "\n",
    # Underscores too, because `_` would continue the name: in `_@bob_` the name ends at the markup.
    "em_open": "*",
    "em_close": "*",
    "strong_open": "*",
    "strong_close": "*",
    "s_open": "~",
    "s_close": "~",
    "link_open": "[",
    "link_close": ")",
}


@dataclass(frozen=True)
class Candidate:
    """An `@` and what follows it, which may be a mention."""

    text: str  # as written, with the @, without trailing punctuation
    names: tuple[str, ...]  # possible names: lower case, longest first, each matching `NAME`


NOT_READABLE = Candidate("", ())
"""Replaces all candidates of a content that exceeds the parser's limits; `resolve` warns of it."""


@dataclass(frozen=True)
class MentionedUser:
    """A member of the message's server. `sees_channel` refers to the message's channel."""

    id: int
    username: str
    sees_channel: bool


@dataclass(frozen=True)
class MentionedRole:
    """A role of the message's server."""

    id: int
    name: str


@dataclass(frozen=True)
class MentionWarning:
    """Why a text that looks like a mention notifies nobody, for the author."""

    code: str
    detail: str


@dataclass(frozen=True)
class AllowedMentions:
    """The ids that the author allows to be mentioned; it restricts the mentions of the text and adds none."""

    users: frozenset[int]
    roles: frozenset[int]
    everyone: bool


@dataclass(frozen=True)
class Mentions:
    """The mentions, each once, in order of appearance; all `users` see the channel."""

    users: tuple[MentionedUser, ...]
    roles: tuple[MentionedRole, ...]
    everyone: bool
    warnings: tuple[MentionWarning, ...]

    @property
    def names(self) -> frozenset[str]:
        """The names behind the `@` of the mentions, in lower case."""
        users_by_name, roles = (user.username for user in self.users), (role.name for role in self.roles)
        return frozenset((*users_by_name, *roles, *([EVERYONE] if self.everyone else [])))


NOT_READ_DETAIL = (
    "this message has so much nested or repeated markup that it is shown as plain text and mentions nobody; "
    "remove markup to mention somebody"
)

NO_MENTIONS = Mentions(users=(), roles=(), everyone=False, warnings=())


def find_mentions(content: str) -> tuple[Candidate, ...]:
    """Find the possible mentions of a content, read as CommonMark: each distinct text once, in order of appearance.

    Upper and lower case are the same. () without any; only NOT_READABLE where parsing takes more than
    `markdown.MAX_STEPS`. Never raises.

    - Only text counts, also in link labels, image descriptions, headings and lists: no code, no link target or title,
      no autolink, nothing in a block quote.
    - The `@` is written plainly: `\\@` and `&#64;` mention nobody.
    - It stands at the start of a block, or after white space or one of `'"([{/<>*_~|`. Emphasis counts as the character
      that it is written with; a code span, a link and an image do not count.
    - The name is the longest sequence of ASCII letters, digits and `. - _` that starts with a letter or digit. Trailing
      punctuation is not part of it. Escapes within it count as the characters that they stand for.
    - A sequence that another letter, digit or mark follows (`@bobé`) is a word of another alphabet, and one that
      `@host.tld` follows is an address: neither is a mention, nor is its beginning.
    - A sequence may mean itself, or any beginning of it that ends before one of `. - _` and has 3 to 32 characters:
      `@bob.smith` means bob.smith or else bob, and `@bobby` never bob.
    """
    if "@" not in content:  # as in most messages: the parser would take longer than the rest of a post
        return ()
    try:
        tokens = markdown.parse(content)
    except markdown.ParseBudgetExceeded:
        return (NOT_READABLE,)
    found: dict[str, Candidate] = {}
    for text in markdown.tokens_outside_quotes(tokens):
        for _, candidate in candidates_in("".join(piece for _, piece in tokens_with_text(text))):
            found.setdefault(candidate.text.lower(), candidate)
    return tuple(found.values())


def candidates_in(text: str) -> Iterator[tuple[int, Candidate]]:
    """The candidates in the text of one block, joined from `tokens_with_text`, and the position of each `@`."""
    for match in _MENTION.finditer(text):
        if _continues_word(text, match.end()):
            continue
        run = match["run"].rstrip(_PUNCTUATION)
        if names := _names(run.lower()):
            yield match.start(), Candidate(f"@{run}", names)


def possible_names(candidates: Iterable[Candidate]) -> set[str]:
    """The lower-case names to look up among users and roles before `resolve`; without `everyone`."""
    return {name for candidate in candidates for name in candidate.names} - {EVERYONE}


def resolve(
    candidates: Iterable[Candidate],
    users_by_name: Mapping[str, MentionedUser],
    roles: Mapping[str, MentionedRole],
    *,
    may_ping_groups: bool,
    allowed: AllowedMentions | None = None,
) -> Mentions:
    """Resolve candidates. `users_by_name` and `roles` are the server's, by lower-case name.

    `may_ping_groups` is true for admins and moderators; `allowed` None restricts nothing.

    - A candidate means the longest of its names that exists, and no shorter one where that may not be mentioned.
      `everyone` always exists; a user comes before a role of the same name.
    - No name exists: `unknown_mention`.
    - A user who cannot see the channel: `mention_without_access`, and not mentioned.
    - A role or everyone, by an author who may not: `mention_not_allowed`, and not mentioned.
    - What `allowed` leaves out is left out without a warning. The warnings above do not depend on `allowed`.
    """
    mentioned: dict[int, MentionedUser] = {}
    groups: dict[int, MentionedRole] = {}
    everyone = False
    warnings = _Warnings()

    for candidate in candidates:
        name = next((n for n in candidate.names if n == EVERYONE or n in users_by_name or n in roles), None)
        if candidate is NOT_READABLE:
            warnings.add(NOT_READ, "", NOT_READ_DETAIL)
        elif name is None:
            warnings.add(UNKNOWN, candidate.text, "{} is not a member of this server")
        elif name != EVERYONE and name in users_by_name:
            user = users_by_name[name]
            if user.sees_channel:
                mentioned[user.id] = user
            else:
                warnings.add(WITHOUT_ACCESS, f"@{user.username}", "{} cannot see this channel")
        elif not may_ping_groups:
            warnings.add(NOT_ALLOWED, f"@{name}", "only admins and moderators may mention {}")
        elif name == EVERYONE:
            everyone = True
        else:
            groups[roles[name].id] = roles[name]

    return Mentions(
        users=tuple(p for p in mentioned.values() if allowed is None or p.id in allowed.users),
        roles=tuple(r for r in groups.values() if allowed is None or r.id in allowed.roles),
        everyone=everyone and (allowed is None or allowed.everyone),
        warnings=warnings.shown(),
    )


class _Warnings:
    """The first MAX_WARNINGS distinct warnings, and the number of the others."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self._first: list[MentionWarning] = []

    def add(self, code: str, about: str, detail: str) -> None:
        """`detail` has {} in place of `about`, which is shortened there."""
        if (code, about) in self._seen:
            return
        self._seen.add((code, about))
        if len(self._first) < MAX_WARNINGS:
            self._first.append(MentionWarning(code, detail.format(truncate(about, _WARNING_CHARACTERS))))

    def shown(self) -> tuple[MentionWarning, ...]:
        more = len(self._seen) - len(self._first)
        rest = [MentionWarning(MORE_WARNINGS, f"{more} more warnings are not shown")] if more else []
        return (*self._first, *rest)


def tokens_with_text(tokens: Sequence[Token]) -> Iterator[tuple[Token, str]]:
    """The text of one block as displayed, token by token, to be joined.

    Each piece of markup is one character, and every `@` that is not a mention is removed, so that a name which the
    parser split is whole again. A text token has as many characters as its content; tokens within a link of their own
    address are left out.
    """
    in_autolink = False
    for token in tokens:
        if in_autolink and token.type != "link_close":
            continue
        in_autolink = token.type == "link_open" and token.info == "auto"
        if token.type == "text":
            yield token, token.content
        elif token.type == "text_special":
            yield token, token.content.replace("@", _BOUNDARY)
        elif token.type == "image":
            yield token, "["
            yield from tokens_with_text(token.children or ())
            yield token, ")"
        else:
            yield token, _MARKUP.get(token.type, _BOUNDARY)


def _continues_word(text: str, end: int) -> bool:
    """Whether the name that ends at `end` is only the beginning of a word in another alphabet, or of an address."""
    foreign = unicodedata.category(text[end : end + 1] or " ")[0] in "LNM"
    return foreign or _REST_OF_ADDRESS.match(text, end) is not None


def _names(run: str) -> tuple[str, ...]:
    """The names that a lower-case text without trailing punctuation may mean, longest first."""
    # The search is bounded by the longest name, so that one long text does not take quadratic time.
    ends = [at for at in range(min(len(run), LONGEST + 1)) if run[at] in _PUNCTUATION] + [len(run)]
    beginnings = dict.fromkeys(run[:end].rstrip(_PUNCTUATION) for end in reversed(ends))
    return tuple(name for name in beginnings if SHORTEST <= len(name) <= LONGEST)
