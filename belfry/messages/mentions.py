"""Who a message names: from its text to people and roles.

Reading the text (`find_mentions`) and knowing the server (`resolve`) are apart: the caller looks up
`possible_names` in between, in as many statements as it likes, and nothing here touches a database.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markdown_it.token import Token

from belfry.core.errors import truncate
from belfry.messages import markdown

EVERYONE = "everyone"

# A whole valid username or role name, to be held against the lower-case name. It ends in a letter or a
# digit: in a text a trailing `. - _` belongs to the sentence, so that a name ending in one could never be
# mentioned, and is refused when somebody wants to bear it.
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
_WARNING_CHARACTERS = 64  # of what it quotes: a run may be as long as the content

# `re.IGNORECASE` would let in the Kelvin sign and the long s: the classes are spelled out instead.
_MENTION = re.compile(r"(?:\A|(?<=[\s'\"(\[{/<>*_~|]))@(?P<run>[A-Za-z0-9][A-Za-z0-9_.-]*)")
_PUNCTUATION = "._-"
_REST_OF_ADDRESS = re.compile(r"@[A-Za-z0-9-]+\.[A-Za-z0-9]")

# Stands for an `@` that is not one, and for all markup that may neither come before a mention nor go on
# with a name.
_BOUNDARY = "`"
_MARKUP = {
    "softbreak": "\n",
    "hardbreak": "\n",
    # Underscores too, since `_` would go on with the name: in `_@bob_` the name ends at the markup.
    "em_open": "*",
    "em_close": "*",
    "strong_open": "*",
    "strong_close": "*",
    "link_open": "[",
    "link_close": ")",
}


@dataclass(frozen=True)
class Candidate:
    """An `@` and what follows it, which may turn out to name somebody."""

    text: str  # as written, with the @, without trailing punctuation
    names: tuple[str, ...]  # what it can mean: lower case, longest first, each matching `NAME`


NOT_READABLE = Candidate("", ())
"""In place of all candidates of a content that cannot be parsed within the limits; `resolve` warns of it."""


@dataclass(frozen=True)
class MentionedUser:
    """A member of the message's server. `sees_channel` is about the message's channel."""

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
    """Why something that looks like a mention tells nobody, for the author to read."""

    code: str
    detail: str


@dataclass(frozen=True)
class AllowedMentions:
    """All that the author wants pinged, by id; it narrows what the text says and adds nothing."""

    users: frozenset[int]
    roles: frozenset[int]
    everyone: bool


@dataclass(frozen=True)
class Mentions:
    """Who is mentioned, each once, in order of appearance; `users` all see the channel."""

    users: tuple[MentionedUser, ...]
    roles: tuple[MentionedRole, ...]
    everyone: bool
    warnings: tuple[MentionWarning, ...]

    @property
    def names(self) -> frozenset[str]:
        """What stands behind the `@` of those who are mentioned, in lower case."""
        people, roles = (person.username for person in self.users), (role.name for role in self.roles)
        return frozenset((*people, *roles, *([EVERYONE] if self.everyone else [])))


NOT_READ_DETAIL = (
    "this message has so much nested or repeated markup that it is shown as plain text and mentions nobody; "
    "remove markup to mention somebody"
)

NO_MENTIONS = Mentions(users=(), roles=(), everyone=False, warnings=())


def find_mentions(content: str) -> tuple[Candidate, ...]:
    """What in `content`, read as CommonMark, may be a mention; in order of appearance, each distinct text
    (whatever its case, as first written) once. Empty where there is none. Only NOT_READABLE where parsing the text
    takes more than `markdown.MAX_STEPS`. Never raises.

    - Only text counts, that of link labels, image descriptions, headings and lists too: no code, no link's
      target or title, no autolink, nothing in a block quote.
    - The `@` is written plainly: `\\@` and `&#64;` are how to write one that mentions nobody.
    - Before it is the start of the block, white space, or one of `'"([{/<>*_~|`. Emphasis counts as the
      character that it is written with; a code span, a link and an image count as none of these.
    - The name is the longest run of ASCII letters, digits and `. - _` that starts with a letter or digit.
      Trailing punctuation is not part of it. Escapes within it count as the characters they stand for.
    - A run that another letter, digit or mark follows (`@bobé`) is a name in a larger alphabet than ours,
      and one that `@host.tld` follows is an address: neither is a mention, nor is its beginning.
    - A run may mean itself or any beginning of it that ends before one of `. - _` (`@bob.smith`: bob.smith,
      else bob; `@bobby`: never bob), of 3 to 32 characters. One that can mean nothing is text.
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
    """The candidates in the text of one block, as the `tokens_with_text` of it joined, and where the `@` of each is."""
    for match in _MENTION.finditer(text):
        if _continues_word(text, match.end()):
            continue
        run = match["run"].rstrip(_PUNCTUATION)
        if names := _names(run.lower()):
            yield match.start(), Candidate(f"@{run}", names)


def possible_names(candidates: Iterable[Candidate]) -> set[str]:
    """All lower-case names that must be looked up, among people and roles alike, before `resolve`;
    without `everyone`, which is nobody's."""
    return {name for candidate in candidates for name in candidate.names} - {EVERYONE}


def resolve(
    candidates: Iterable[Candidate],
    people: Mapping[str, MentionedUser],
    roles: Mapping[str, MentionedRole],
    *,
    may_ping_groups: bool,
    allowed: AllowedMentions | None = None,
) -> Mentions:
    """Whom `candidates` mention. `people` and `roles` are this server's alone, by lower-case name;
    `may_ping_groups` is true of admins and moderators; `allowed` None narrows nothing.

    - A candidate means the longest of its names that exists, and no shorter one where that may not be
      pinged. `everyone` always exists, and means everyone; a person comes before a role of the same name.
    - No name exists: `unknown_mention`.
    - A person who cannot see the channel: `mention_without_access`, and not mentioned.
    - A role or everyone, by one who may not: `mention_not_allowed`, and not mentioned.
    - What `allowed` leaves out is left out without a warning. The warnings above are about the text, and are
      the same whatever `allowed` says.
    """
    mentioned: dict[int, MentionedUser] = {}
    groups: dict[int, MentionedRole] = {}
    everyone = False
    warnings = _Warnings()

    for candidate in candidates:
        name = next((n for n in candidate.names if n == EVERYONE or n in people or n in roles), None)
        if candidate is NOT_READABLE:
            warnings.add(NOT_READ, "", NOT_READ_DETAIL)
        elif name is None:
            warnings.add(UNKNOWN, candidate.text, "{} is nobody in this server")
        elif name != EVERYONE and name in people:
            person = people[name]
            if person.sees_channel:
                mentioned[person.id] = person
            else:
                warnings.add(WITHOUT_ACCESS, f"@{person.username}", "{} cannot see this channel")
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
    """The first MAX_WARNINGS distinct warnings, and how many more there are."""

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
    """The text of one block as displayed, with a character for each piece of markup, and every `@` that does not
    count gone: token by token, to be joined, so that a name which the parser took apart is whole again.

    A token of text gives as many characters as it has, and those within a link of its own address are left out.
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
    """Whether the run that ends at `end` is but the beginning of a word in another alphabet, or of an
    address."""
    foreign = unicodedata.category(text[end : end + 1] or " ")[0] in "LNM"
    return foreign or _REST_OF_ADDRESS.match(text, end) is not None


def _names(run: str) -> tuple[str, ...]:
    """The names that a lower-case run without trailing punctuation may mean, longest first."""
    # Looking no further than a name can be long keeps a text of one long run from being quadratic.
    ends = [at for at in range(min(len(run), LONGEST + 1)) if run[at] in _PUNCTUATION] + [len(run)]
    beginnings = dict.fromkeys(run[:end].rstrip(_PUNCTUATION) for end in reversed(ends))
    return tuple(name for name in beginnings if SHORTEST <= len(name) <= LONGEST)
