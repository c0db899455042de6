"""Mentions: a table of cases (`data/mention_cases.json`) in one small server, properties that hold of any
text, and an oracle that reads plain text character by character, without the library or a pattern."""

from __future__ import annotations

import json
import re
import time
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from belfry.messages.mentions import (
    EVERYONE,
    NAME,
    AllowedMentions,
    Candidate,
    MentionedRole,
    MentionedUser,
    Mentions,
    MentionWarning,
    find_mentions,
    possible_names,
    resolve,
)
from tools.dev import ROOT

# The server of all cases. Two cannot see the channel; `traders` is a person and a role; some names begin
# with another's, and one is as long as a name may be.
SEEING = [
    *("alice", "bob", "bob.smith", "carol.ann", "dave", "a_b_c", "x-ray", "007", "abc", "kim", "traders"),
    "abcdefghijklmnopqrstuvwxyz012345",
]
BLIND = ["carol", "bob.hidden"]
PEOPLE = {name: MentionedUser(at, name, name in SEEING) for at, name in enumerate(SEEING + BLIND, start=1)}
GROUPS = ["moderators", "vip", "vip.gold", "traders", "traders-1", "bob.team", "everyone-gold"]
ROLES = {name: MentionedRole(at, name) for at, name in enumerate(GROUPS, start=101)}

CASES: list[dict[str, Any]] = json.loads((ROOT / "tests" / "data/mention_cases.json").read_text())


def allowed_in(case: dict[str, Any]) -> AllowedMentions | None:
    """The case's `allowed`, which has names for ids."""
    if (names := case.get("allowed")) is None:
        return None
    return AllowedMentions(
        users=frozenset(PEOPLE[name].id for name in names["users"]),
        roles=frozenset(ROLES[name].id for name in names["roles"]),
        everyone=names["everyone"],
    )


def mentions_in(content: str, *, may_ping_groups: bool = False) -> Mentions:
    return resolve(find_mentions(content), PEOPLE, ROLES, may_ping_groups=may_ping_groups)


def details_of(content: str) -> list[str]:
    return [warning.detail for warning in mentions_in(content).warnings]


def texts_in(content: str) -> list[str]:
    return [candidate.text for candidate in find_mentions(content)]


# -- The table


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_case(case: dict[str, Any]) -> None:
    got = resolve(
        find_mentions(case["content"]),
        PEOPLE,
        ROLES,
        may_ping_groups=case.get("author", "member") == "moderator",
        allowed=allowed_in(case),
    )
    assert {
        "users": [person.username for person in got.users],
        "roles": [role.name for role in got.roles],
        "everyone": got.everyone,
        "warnings": [warning.code for warning in got.warnings],
    } == {key: case[key] for key in ("users", "roles", "everyone", "warnings")}


def test_the_table_is_well_formed() -> None:
    assert len({case["name"] for case in CASES}) == len(CASES) >= 170
    keys = {"name", "content", "users", "roles", "everyone", "warnings"}
    for case in CASES:
        assert keys <= case.keys() <= keys | {"author", "allowed"}
        assert case.get("author") in (None, "moderator")
        assert 1 <= len(case["content"]) <= 10_000
        assert "\0" not in case["content"]


# -- What the table does not show: candidates and the words of warnings


def test_names_are_lower_case_and_longest_first() -> None:
    assert find_mentions("(@Bob.Smith-x_)") == (
        Candidate("@Bob.Smith-x", ("bob.smith-x", "bob.smith", "bob")),
    )


def test_beginnings_are_valid_names_too() -> None:
    assert [candidate.names for candidate in find_mentions("@bob.-smith @a_b__c @ab..cd")] == [
        ("bob.-smith", "bob"),
        ("a_b__c", "a_b"),
        ("ab..cd",),
    ]


def test_each_text_once_as_first_written() -> None:
    assert texts_in("@Bob, @alice, @BOB. @bob.smith") == ["@Bob", "@alice", "@bob.smith"]


def test_what_must_be_looked_up() -> None:
    assert possible_names(find_mentions("@bob.smith @everyone @everyone-gold")) == {
        "bob.smith",
        "bob",
        "everyone-gold",
    }
    assert possible_names(()) == set()


@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("abc", True),
        ("007", True),
        ("a_b-c.d", True),
        ("a.b", True),
        ("x" * 32, True),
        ("x" * 33, False),
        ("ab", False),
        ("", False),
        ("Bob", False),
        (".bob", False),
        ("bob.", False),
        ("bob-", False),
        ("bob_", False),
        ("bob\n", False),
        (" bob", False),
        ("bo b", False),
        ("bo\u00e9b", False),
        ("\u212aim", False),
        ("\u0661\u0662\u0663", False),
    ],
)
def test_a_valid_name(name: str, valid: bool) -> None:
    # However the pattern is applied.
    assert [bool(apply(name)) for apply in (NAME.match, NAME.search, NAME.fullmatch)] == [valid] * 3


@pytest.mark.parametrize("name", [*PEOPLE, *ROLES, EVERYONE])
def test_every_valid_name_can_be_mentioned(name: str) -> None:
    assert NAME.match(name)
    assert find_mentions(f"@{name}.")[0].names[0] == name


def test_words_of_the_warnings() -> None:
    assert details_of("@bobby") == ["@bobby is not a member of this server"]
    assert details_of("@BoBBy.x.") == ["@BoBBy.x is not a member of this server"]
    assert details_of("@carol") == ["@carol cannot see this channel"]
    for content in ("@everyone", "@vip"):
        assert details_of(content) == [f"only admins and moderators may mention {content}"]


def test_twenty_warnings_are_shown_and_how_many_more_there_are() -> None:
    for count, more in ((20, []), (21, [1]), (1_890, [1_870])):
        warnings = mentions_in(" ".join(f"@x{number:04}" for number in range(count))).warnings
        assert [warning.detail for warning in warnings[20:]] == [f"{rest} more warnings are not shown" for rest in more]
        assert [warning.code for warning in warnings] == ["unknown_mention"] * 20 + ["more_warnings"] * len(more)
        assert warnings[19].detail == "@x0019 is not a member of this server"


def test_a_warning_is_counted_once_however_often_a_name_is_mentioned() -> None:
    everybody = " ".join(f"@carol.x{number:04}" for number in range(1_000))  # each means carol, who cannot see it
    assert details_of(everybody) == ["@carol cannot see this channel"]


def test_the_author_is_warned_where_the_text_cannot_be_read_within_the_limits() -> None:
    for content in ("@bob " + "![![a](b" * 1_200, "[" * 9_000 + " @bob", ">#\n;\n" * 1_900 + "\n@bob"):
        found = mentions_in(content)
        assert (found.users, found.roles, found.everyone) == ((), (), False)
        assert [warning.code for warning in found.warnings] == ["mentions_not_read"]
        assert not found.names
        assert not possible_names(find_mentions(content))


def test_a_warning_quotes_a_long_run_in_short() -> None:
    [detail] = details_of("@abcd." + "x" * 9_000)
    assert detail == f"@abcd.{'x' * 58}… is not a member of this server"


def test_everyone_is_nobodys_name() -> None:
    people = {EVERYONE: MentionedUser(1, EVERYONE, True)}
    got = resolve(find_mentions("@everyone"), people, {}, may_ping_groups=True)
    assert got == Mentions((), (), True, ())


# -- What must not grow


@pytest.mark.parametrize(
    "content",
    [
        "@" * 10_000,
        "@bob" * 2_500,
        "@a." * 3_333,
        "@" + "a." * 5_000,
        "[" * 10_000,
        "![" * 5_000,
        "![[](" * 2_000,
        "[a](" * 2_500,
        "[a]: x\n\n" + "[a][" * 2_498,
        "*@" * 5_000,
        "*_" * 5_000,
        "`" * 10_000,
        "<a:" * 3_333,
        "&#" * 5_000,
        ">" * 10_000,
        "> " * 50 + "a\n" * 4_950,
        ">#\n;\n" * 2_000,
        ">>>#\n;\n" * 1_428,
        ">>\n" * 5 + ";\n" * 4_000,
        "- " * 5_000,
        "- " * 50 + "a\n" * 4_950,
        "> - " * 2_500,
        "[a]: x\n" * 1_400,
    ],
    ids=lambda content: repr(content[:8]),
)
def test_the_nastiest_text_does_not_take_seconds(content: str) -> None:
    started = time.process_time()
    find_mentions(content)
    # A second on a slow machine; fifteen for some of these without the maxima.
    assert time.process_time() - started < 5


def test_honest_text_is_not_cut_short() -> None:
    reply = "> # news\n> - @alice said\n>   so\n\n- I do not think so, **really**\n  - nor does [she](http://x)\n\n"
    assert texts_in(reply * (9_900 // len(reply)) + "@bob") == ["@bob"]
    assert texts_in("> x\n- y\n" * 1_200 + "\n@bob") == ["@bob"]
    assert texts_in("[" * 2_000 + " @bob") == ["@bob"]
    assert texts_in("@" * 9_000 + " @bob") == ["@bob"]


# -- Properties

# A busy machine is no failure; what may not take long is above.
any_time = settings(deadline=None)

MARKUP = [*"@aBé0.-_*`~>#[]()<>!\\&;:\"'|{}+=/ \n\r\t\u200b\u0301", "@bob", "    ", "![", "](", "> "]
ANY_TEXT = st.text(st.characters()) | st.lists(st.sampled_from(MARKUP)).map("".join)
ONE_LINE = ANY_TEXT.map(lambda text: re.sub(r"[\r\n]", " ", text))
WORLD_CONTENT = st.lists(
    st.sampled_from([*PEOPLE, *ROLES, EVERYONE, "bobby"]).map(lambda name: f"@{name}") | ANY_TEXT
).map(" ".join)


def fence_for(text: str) -> str:
    """A row of backticks longer than any in the text, and long enough for a fence."""
    return "`" * (3 + max(map(len, re.findall("`+", text)), default=0))


@any_time
@given(ANY_TEXT)
def test_any_text_gives_well_formed_candidates(content: str) -> None:
    found = find_mentions(content)
    assert len({candidate.text.lower() for candidate in found}) == len(found)
    for candidate in found:
        assert candidate.names
        assert all(NAME.match(name) for name in candidate.names)
        assert all(candidate.text[1:].lower().startswith(name) for name in candidate.names)
        assert list(candidate.names) == sorted(set(candidate.names), key=len, reverse=True)


@any_time
@given(ANY_TEXT)
def test_nothing_in_a_fence_counts(text: str) -> None:
    fence = fence_for(text)
    assert texts_in(f"@alice\n\n{fence}\n{text}\n@bob\n{fence}\n\n@dave") == ["@alice", "@dave"]
    assert texts_in(f"@alice\n{fence}\n{text}\n@bob") == ["@alice"]  # never closed


@any_time
@given(ONE_LINE)
def test_nothing_in_a_code_span_counts(text: str) -> None:
    ticks = fence_for(text)
    assert texts_in(f"@alice {ticks} {text} @bob {ticks} @dave") == ["@alice", "@dave"]


@any_time
@given(ANY_TEXT)
def test_nothing_in_a_quote_counts(text: str) -> None:
    quote = "\n".join(f"> {line}" for line in re.split(r"\r\n|\r|\n", text))
    assert texts_in(f"@alice\n\n{quote}\n> @bob\n\n@dave") == ["@alice", "@dave"]


@any_time
@given(ANY_TEXT)
def test_nothing_without_a_plain_at_sign(text: str) -> None:
    assert find_mentions(text.replace("@", "&#64;")) == ()


@any_time
@given(WORLD_CONTENT, st.booleans())
def test_only_those_who_are_there_and_may_be_named(content: str, may_ping_groups: bool) -> None:
    candidates = find_mentions(content)
    got = resolve(candidates, PEOPLE, ROLES, may_ping_groups=may_ping_groups)
    assert got == resolve(candidates, PEOPLE, ROLES, may_ping_groups=may_ping_groups)
    assert got == resolve(candidates + candidates, PEOPLE, ROLES, may_ping_groups=may_ping_groups)
    assert all(person in PEOPLE.values() and person.sees_channel for person in got.users)
    assert all(role in ROLES.values() for role in got.roles)
    assert may_ping_groups or not (got.roles or got.everyone)
    for group in (got.users, got.roles, got.warnings):
        assert len(set(group)) == len(group)
    # Somebody else's server: the same text names nobody.
    assert resolve(candidates, {}, {}, may_ping_groups=may_ping_groups).users == ()


@any_time
@given(
    WORLD_CONTENT,
    st.frozensets(st.sampled_from([person.id for person in PEOPLE.values()])),
    st.frozensets(st.sampled_from([role.id for role in ROLES.values()])),
    st.booleans(),
)
def test_allowed_only_takes_away(
    content: str, users: frozenset[int], roles: frozenset[int], everyone: bool
) -> None:
    candidates = find_mentions(content)
    wide = resolve(candidates, PEOPLE, ROLES, may_ping_groups=True)
    narrow = resolve(
        candidates,
        PEOPLE,
        ROLES,
        may_ping_groups=True,
        allowed=AllowedMentions(users, roles, everyone),
    )
    assert narrow == Mentions(
        users=tuple(person for person in wide.users if person.id in users),
        roles=tuple(role for role in wide.roles if role.id in roles),
        everyone=wide.everyone and everyone,
        warnings=wide.warnings,
    )


# -- The oracle: plain text of one line, in which nothing is markup

WORDS = [*PEOPLE, *ROLES, EVERYONE, "Bob", "EVERYONE", "bobby", "x", "é", "\u0301", "\u212a", "٣"]
PLAIN = st.lists(
    st.sampled_from([*WORDS, *"@@@@@@@@ ...,:;-/({'\"|~)}?=+\u200b\u3000", " @", "(@", "@bob", ".com"])
).map(
    # A word first, so that no hyphen or digit starts a list; no underscore but in the one name
    # that has some, where it is inside a word.
    lambda parts: re.sub(r"(?<![0-9A-Za-z])a_b_c|a_b_c(?![0-9A-Za-z.-])", "abc", "x" + "".join(parts))
)
ASCII_ALNUM = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
OPENERS = frozenset("'\"([{/<>*_~|")


def is_address(rest: str) -> bool:
    """Whether what comes after a name makes it the user of an address: `@`, a host, a dot, and more."""
    host, dot, domain = rest[1:].partition(".")
    return (
        rest[:1] == "@"
        and bool(host and dot)
        and all(char in ASCII_ALNUM or char == "-" for char in host)
        and domain[:1] in ASCII_ALNUM
    )


def oracle(text: str) -> Mentions:
    """What a moderator's plain text mentions, the slow way: at each @, every length is tried."""
    users: list[MentionedUser] = []
    roles: list[MentionedRole] = []
    everyone = False
    warnings: list[MentionWarning] = []
    unknown: set[str] = set()
    for at, char in enumerate(text):
        if char != "@" or (at and not (text[at - 1].isspace() or text[at - 1] in OPENERS)):
            continue
        rest = text[at + 1 :]
        length = 0
        while length < len(rest) and (rest[length] in ASCII_ALNUM or rest[length] in ".-_"):
            length += 1
        run, after = rest[:length], rest[length:]
        foreign = after[:1] and unicodedata.category(after[0])[0] in ("L", "N", "M")
        if foreign or is_address(after):
            continue
        while run and run[-1] not in ASCII_ALNUM:
            run = run[:-1]
        if not run or run[0] not in ASCII_ALNUM:
            continue
        possible = False
        for size in range(min(len(run), 32), 2, -1):
            name = run[:size].lower()
            if name[-1] not in ASCII_ALNUM or (size < len(run) and run[size] in ASCII_ALNUM):
                continue
            possible = True
            if name == EVERYONE:
                everyone = True
            elif name in PEOPLE and PEOPLE[name].sees_channel:
                users += [] if PEOPLE[name] in users else [PEOPLE[name]]
            elif name in PEOPLE:
                warning = MentionWarning("mention_without_access", f"@{name} cannot see this channel")
                warnings += [] if warning in warnings else [warning]
            elif name in ROLES:
                roles += [] if ROLES[name] in roles else [ROLES[name]]
            else:
                continue
            break
        else:
            if possible and run.lower() not in unknown:
                unknown.add(run.lower())
                warnings.append(MentionWarning("unknown_mention", f"@{run} is not a member of this server"))
    if len(warnings) > 20:
        warnings[20:] = [MentionWarning("more_warnings", f"{len(warnings) - 20} more warnings are not shown")]
    return Mentions(tuple(users), tuple(roles), everyone, tuple(warnings))


@any_time
@given(PLAIN)
def test_plain_text_is_read_as_by_the_oracle(text: str) -> None:
    assert mentions_in(text, may_ping_groups=True) == oracle(text)


@any_time
@given(PLAIN)
def test_said_twice_is_said_once(text: str) -> None:
    assert find_mentions(f"{text}\n\n{text}") == find_mentions(text)
