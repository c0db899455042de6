"""Mentions: a table of cases (`data/mention_cases.json`) in one small server, properties that hold for any
text, and an oracle that parses plain text character by character, without the library or a pattern."""

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

# The server of all cases. Two users cannot see the channel; `traders` is a user and a role; some names begin
# with another name, and one has the maximum length.
WITH_ACCESS = [
    *("alice", "bob", "bob.smith", "carol.ann", "dave", "a_b_c", "x-ray", "007", "abc", "kim", "traders"),
    "abcdefghijklmnopqrstuvwxyz012345",
]
WITHOUT_ACCESS = ["carol", "bob.hidden"]
PEOPLE = {
    name: MentionedUser(at, name, name in WITH_ACCESS)
    for at, name in enumerate(WITH_ACCESS + WITHOUT_ACCESS, start=1)
}
GROUPS = ["moderators", "vip", "vip.gold", "traders", "traders-1", "bob.team", "everyone-gold"]
ROLES = {name: MentionedRole(at, name) for at, name in enumerate(GROUPS, start=101)}

CASES: list[dict[str, Any]] = json.loads((ROOT / "tests" / "data/mention_cases.json").read_text())


def allowed_in(case: dict[str, Any]) -> AllowedMentions | None:
    """Convert the case's `allowed`, which has names in place of ids."""
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
    found = resolve(
        find_mentions(case["content"]),
        PEOPLE,
        ROLES,
        may_ping_groups=case.get("author", "member") == "moderator",
        allowed=allowed_in(case),
    )
    assert {
        "users": [person.username for person in found.users],
        "roles": [role.name for role in found.roles],
        "everyone": found.everyone,
        "warnings": [warning.code for warning in found.warnings],
    } == {key: case[key] for key in ("users", "roles", "everyone", "warnings")}


def test_the_table_is_well_formed() -> None:
    assert len({case["name"] for case in CASES}) == len(CASES) >= 170
    keys = {"name", "content", "users", "roles", "everyone", "warnings"}
    for case in CASES:
        assert keys <= case.keys() <= keys | {"author", "allowed"}
        assert case.get("author") in (None, "moderator")
        assert 1 <= len(case["content"]) <= 10_000
        assert "\0" not in case["content"]


# -- Candidates and the text of warnings, which the table does not cover


def test_candidate_names_are_lower_case_and_longest_first() -> None:
    assert find_mentions("(@Bob.Smith-x_)") == (
        Candidate("@Bob.Smith-x", ("bob.smith-x", "bob.smith", "bob")),
    )


def test_candidate_names_include_only_valid_prefixes() -> None:
    assert [candidate.names for candidate in find_mentions("@bob.-smith @a_b__c @ab..cd")] == [
        ("bob.-smith", "bob"),
        ("a_b__c", "a_b"),
        ("ab..cd",),
    ]


def test_each_mention_is_a_candidate_once_in_its_first_spelling() -> None:
    assert texts_in("@Bob, @alice, @BOB. @bob.smith") == ["@Bob", "@alice", "@bob.smith"]


def test_possible_names_are_all_names_that_must_be_looked_up() -> None:
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
def test_the_name_pattern_accepts_only_valid_names(name: str, valid: bool) -> None:
    # The result is the same for every method of the pattern.
    assert [bool(method(name)) for method in (NAME.match, NAME.search, NAME.fullmatch)] == [valid] * 3


@pytest.mark.parametrize("name", [*PEOPLE, *ROLES, EVERYONE])
def test_every_valid_name_can_be_mentioned(name: str) -> None:
    assert NAME.match(name)
    assert find_mentions(f"@{name}.")[0].names[0] == name


def test_the_text_of_warnings() -> None:
    assert details_of("@bobby") == ["@bobby is not a member of this server"]
    assert details_of("@BoBBy.x.") == ["@BoBBy.x is not a member of this server"]
    assert details_of("@carol") == ["@carol cannot see this channel"]
    for content in ("@everyone", "@vip"):
        assert details_of(content) == [f"only admins and moderators may mention {content}"]


def test_warnings_are_limited_to_twenty_and_the_rest_is_counted() -> None:
    for count, more in ((20, []), (21, [1]), (1_890, [1_870])):
        warnings = mentions_in(" ".join(f"@x{number:04}" for number in range(count))).warnings
        assert [warning.detail for warning in warnings[20:]] == [f"{rest} more warnings are not shown" for rest in more]
        assert [warning.code for warning in warnings] == ["unknown_mention"] * 20 + ["more_warnings"] * len(more)
        assert warnings[19].detail == "@x0019 is not a member of this server"


def test_repeated_mentions_of_a_name_give_one_warning() -> None:
    everybody = " ".join(f"@carol.x{number:04}" for number in range(1_000))  # carol, who cannot see the channel
    assert details_of(everybody) == ["@carol cannot see this channel"]


def test_a_text_beyond_the_parser_limits_gives_a_warning_and_no_mentions() -> None:
    for content in ("@bob " + "![![a](b" * 1_200, "[" * 9_000 + " @bob", ">#\n;\n" * 1_900 + "\n@bob"):
        found = mentions_in(content)
        assert (found.users, found.roles, found.everyone) == ((), (), False)
        assert [warning.code for warning in found.warnings] == ["mentions_not_read"]
        assert not found.names
        assert not possible_names(find_mentions(content))


def test_a_warning_truncates_a_long_name() -> None:
    [detail] = details_of("@abcd." + "x" * 9_000)
    assert detail == f"@abcd.{'x' * 58}… is not a member of this server"


def test_everyone_is_never_a_username() -> None:
    people = {EVERYONE: MentionedUser(1, EVERYONE, True)}
    found = resolve(find_mentions("@everyone"), people, {}, may_ping_groups=True)
    assert found == Mentions((), (), True, ())


# -- Limits of the time to parse


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
def test_a_hostile_text_is_parsed_within_seconds(content: str) -> None:
    started = time.process_time()
    find_mentions(content)
    # One second on a slow machine; fifteen seconds for some of these texts without the limits.
    assert time.process_time() - started < 5


def test_ordinary_text_is_parsed_completely() -> None:
    reply = "> # news\n> - @alice said\n>   so\n\n- I do not think so, **really**\n  - nor does [she](http://x)\n\n"
    assert texts_in(reply * (9_900 // len(reply)) + "@bob") == ["@bob"]
    assert texts_in("> x\n- y\n" * 1_200 + "\n@bob") == ["@bob"]
    assert texts_in("[" * 2_000 + " @bob") == ["@bob"]
    assert texts_in("@" * 9_000 + " @bob") == ["@bob"]


# -- Properties

# No deadline: a slow machine must not fail these tests. The tests above limit the time.
no_deadline = settings(deadline=None)

MARKUP = [*"@aBé0.-_*`~>#[]()<>!\\&;:\"'|{}+=/ \n\r\t\u200b\u0301", "@bob", "    ", "![", "](", "> "]
ANY_TEXT = st.text(st.characters()) | st.lists(st.sampled_from(MARKUP)).map("".join)
ONE_LINE = ANY_TEXT.map(lambda text: re.sub(r"[\r\n]", " ", text))
WORLD_CONTENT = st.lists(
    st.sampled_from([*PEOPLE, *ROLES, EVERYONE, "bobby"]).map(lambda name: f"@{name}") | ANY_TEXT
).map(" ".join)


def fence_for(text: str) -> str:
    """A sequence of backticks that is longer than any in the text, and long enough for a fence."""
    return "`" * (3 + max(map(len, re.findall("`+", text)), default=0))


@no_deadline
@given(ANY_TEXT)
def test_any_text_gives_valid_candidates(content: str) -> None:
    found = find_mentions(content)
    assert len({candidate.text.lower() for candidate in found}) == len(found)
    for candidate in found:
        assert candidate.names
        assert all(NAME.match(name) for name in candidate.names)
        assert all(candidate.text[1:].lower().startswith(name) for name in candidate.names)
        assert list(candidate.names) == sorted(set(candidate.names), key=len, reverse=True)


@no_deadline
@given(ANY_TEXT)
def test_a_fenced_code_block_contains_no_mentions(text: str) -> None:
    fence = fence_for(text)
    assert texts_in(f"@alice\n\n{fence}\n{text}\n@bob\n{fence}\n\n@dave") == ["@alice", "@dave"]
    assert texts_in(f"@alice\n{fence}\n{text}\n@bob") == ["@alice"]  # the fence is not closed


@no_deadline
@given(ONE_LINE)
def test_a_code_span_contains_no_mentions(text: str) -> None:
    ticks = fence_for(text)
    assert texts_in(f"@alice {ticks} {text} @bob {ticks} @dave") == ["@alice", "@dave"]


@no_deadline
@given(ANY_TEXT)
def test_a_quote_contains_no_mentions(text: str) -> None:
    quote = "\n".join(f"> {line}" for line in re.split(r"\r\n|\r|\n", text))
    assert texts_in(f"@alice\n\n{quote}\n> @bob\n\n@dave") == ["@alice", "@dave"]


@no_deadline
@given(ANY_TEXT)
def test_a_text_without_a_literal_at_sign_contains_no_mentions(text: str) -> None:
    assert find_mentions(text.replace("@", "&#64;")) == ()


@no_deadline
@given(WORLD_CONTENT, st.booleans())
def test_only_existing_and_permitted_names_are_mentioned(content: str, may_ping_groups: bool) -> None:
    candidates = find_mentions(content)
    found = resolve(candidates, PEOPLE, ROLES, may_ping_groups=may_ping_groups)
    assert found == resolve(candidates, PEOPLE, ROLES, may_ping_groups=may_ping_groups)
    assert found == resolve(candidates + candidates, PEOPLE, ROLES, may_ping_groups=may_ping_groups)
    assert all(person in PEOPLE.values() and person.sees_channel for person in found.users)
    assert all(role in ROLES.values() for role in found.roles)
    assert may_ping_groups or not (found.roles or found.everyone)
    for group in (found.users, found.roles, found.warnings):
        assert len(set(group)) == len(group)
    # In another server the same text mentions no user.
    assert resolve(candidates, {}, {}, may_ping_groups=may_ping_groups).users == ()


@no_deadline
@given(
    WORLD_CONTENT,
    st.frozensets(st.sampled_from([person.id for person in PEOPLE.values()])),
    st.frozensets(st.sampled_from([role.id for role in ROLES.values()])),
    st.booleans(),
)
def test_allowed_mentions_only_restrict_the_result(
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


# -- The oracle: plain text of one line without markup

WORDS = [*PEOPLE, *ROLES, EVERYONE, "Bob", "EVERYONE", "bobby", "x", "é", "\u0301", "\u212a", "٣"]
PLAIN = st.lists(
    st.sampled_from([*WORDS, *"@@@@@@@@ ...,:;-/({'\"|~)}?=+\u200b\u3000", " @", "(@", "@bob", ".com"])
).map(
    # A word first, so that no hyphen or digit starts a list; no underscore except in the one name
    # that has some, where it is inside a word.
    lambda parts: re.sub(r"(?<![0-9A-Za-z])a_b_c|a_b_c(?![0-9A-Za-z.-])", "abc", "x" + "".join(parts))
)
ASCII_ALNUM = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
OPENERS = frozenset("'\"([{/<>*_~|")


def is_address(rest: str) -> bool:
    """Whether the text after a name makes it the user of an e-mail address: `@`, a host, a dot, and a domain."""
    host, dot, domain = rest[1:].partition(".")
    return (
        rest[:1] == "@"
        and bool(host and dot)
        and all(char in ASCII_ALNUM or char == "-" for char in host)
        and domain[:1] in ASCII_ALNUM
    )


def oracle(text: str) -> Mentions:
    """The mentions in a moderator's plain text, by a slow method: at each @ it tries every length of a name."""
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


@no_deadline
@given(PLAIN)
def test_the_parser_agrees_with_the_oracle_on_plain_text(text: str) -> None:
    assert mentions_in(text, may_ping_groups=True) == oracle(text)


@no_deadline
@given(PLAIN)
def test_a_repeated_text_has_the_same_mentions(text: str) -> None:
    assert find_mentions(f"{text}\n\n{text}") == find_mentions(text)
