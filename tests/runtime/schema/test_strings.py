"""Strings: patterns, lengths and formats mean what jsonschema takes them for."""

from __future__ import annotations

import ipaddress
import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.runtime.schema.judged import Judged

CHECKER = Draft202012Validator.FORMAT_CHECKER
ALPHABET = 'ab1 .-\nZé٣\u00a0_\x1c\u2028😀/"'
ATOMS = [
    *("a", "b", ".", "[ab]", "[^a]", r"\d", r"\w", r"\s", r"\S", r"\D", r"\W", "é", "1", "-", r"\.", "[a-z]"),
    *(r"[^\s]", r"[^\d]", r"[\w.]", r"[\s\S]", "Z", "(?i:z)", "(?i:[^a])", "(?s:.)", "[a~~b]", "[^\\w-]"),
]


def string(pattern: str = "", **keywords: Any) -> Judged:
    return Judged({"type": "string", **({"pattern": pattern} if pattern else {}), **keywords})


def random_pattern(rng: random.Random, depth: int) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return rng.choice(ATOMS)
    one, other = random_pattern(rng, depth - 1), random_pattern(rng, depth - 1)
    if kind < 0.65:
        return one + other
    if kind < 0.75:
        return f"(?:{one}|{other})"
    if kind < 0.9:
        return f"(?:{one})" + rng.choice(["*", "+", "?", "{2}", "{1,2}", "{0,3}", "{,2}", "*?"])
    return rng.choice([f"^{one}", f"{one}$", f"({one})"])


def anchored_pattern(rng: random.Random) -> str:
    pattern = random_pattern(rng, rng.randint(1, 3))
    if rng.random() < 0.25:
        ahead = rng.choice(["(?!", "(?="]) + random_pattern(rng, 1) + rng.choice(["", "$", ".*b"]) + ")"
        pattern = f"^{ahead}{pattern}"
    elif rng.random() < 0.5:
        pattern = "^" + pattern
    pattern += rng.choice(["", "", "$", "$", r"\Z", "(?=a)"])
    return pattern + ("|" + random_pattern(rng, 1) if rng.random() < 0.1 else "")


def narrower(wrong: str) -> bool:
    """Whether only Python takes a string: a class means ASCII for JSON Schema, and ``$`` the very end."""
    document, _, rest = wrong.partition(" is valid")
    text = json.loads(document) if rest else ""
    return bool(rest) and (not text.isascii() or "\x1c" in text or text.endswith("\n"))


@given(st.integers(0, 100_000))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore:Possible")
def test_any_pattern_with_any_length_agrees_with_jsonschema(seed: int):
    rng = random.Random(seed)
    bounds = {"minLength": rng.randint(0, 3), "maxLength": rng.choice([0, 2, 4, 100])}
    judged = string(anchored_pattern(rng), **{key: bounds[key] for key in bounds if rng.random() < 0.4})
    texts = ["".join(rng.choices(rng.choice([ALPHABET, "ab1.Z"]), k=rng.randint(0, 5))) for _ in range(25)]
    assert not [one for one in judged.wrong(texts) if not narrower(one)], (judged.schema, judged.part)


@pytest.mark.parametrize(
    ("pattern", "accepted", "refused"),
    [
        (r"^\D$", "a", "٣"),  # a digit of Python's
        (r"^[^\w]$", "-", "é"),
        (r"^\S$", "a", "\x1c"),
        (r"^[a~~b]$", "~", "c"),  # no operations on sets
        (r"^[a&&b]$", "&", "c"),
        (r"^a{,2}$", "", "aaa"),
        (r"\Aa\Z", "a", "a "),
        (r"^(?P<x>a)$", "a", "b"),
        (r"^a$|^$", "", "b"),
        (r"^([^,]+(,|$)){2,}$", "a,b", "a"),  # an anchor inside a loop
        (r"^(?!@@)[@a-z]+$", "@a", "@@a"),
        (r"^(?!(false|none|true)$)[a-z]+$", "truest", "true"),
        (r"^(?!.*://)[a-z:/]+$", "a:/b", "a://b"),
        (r"^(?=.{2,3}$)[a-z]*$", "abc", "abcd"),
        (r"[a-z]+(?=\.ya?ml)", "a.yml", "a.json"),
        ("^[\\s\\S]$", "\x1c", "ab"),
        (r"^\u00e9\x2d\U0001F600$", "é-😀", "e-😀"),
    ],
)
@pytest.mark.filterwarnings("ignore:Possible")
def test_a_pattern_llguidance_refuses_or_misreads_is_exact(pattern: str, accepted: str, refused: str):
    judged = string(pattern)
    assert judged.status == "exact"
    assert (judged.accepts(json.dumps(accepted, ensure_ascii=False)), judged.wrong([accepted, refused])) == (True, [])
    assert re.search(pattern, refused) is None


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"(a|b)\1", "back-references"),
        (r"\ba\b", "word boundaries"),
        (r"(?<=a)b", "look-behind"),
        (r"^a(?!b)c?$", "look-ahead"),
        (r"(?m)^a$", "every line"),
        (r"(?>a+)b", "possessive"),
        ("(" * 61 + "a" + ")" * 61, "size"),
        ("^(?!(?:[ab]{100}){100}c)", "size"),
    ],
)
def test_a_pattern_without_a_grammar_is_verified(pattern: str, says: str):
    judged = string(pattern, maxLength=9)
    [(keyword, status, reason)] = judged.notes
    assert (keyword, status) == ("pattern", "verified")
    assert says in reason
    assert judged.part == {"type": "string", "maxLength": 9}


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"pattern": "^[a-z]{3}$", "maxLength": 255}, {"pattern": "^[a-z]{3}$"}),
        ({"pattern": "^[a-z][0-9a-z]*$", "minLength": 2, "maxLength": 63}, {"pattern": "^[a-z][0-9a-z]{1,62}$"}),
        ({"pattern": "^.*$", "maxLength": 9}, {"pattern": r"^[^\x0a]{0,9}$"}),
        ({"pattern": r"^[\s\S]*$", "maxLength": 255}, {"maxLength": 255}),
        ({"minLength": 2.0}, {"minLength": 2}),
        ({"maxLength": 100_000}, {"maxLength": 100_000}),
    ],
)
def test_a_length_is_counted_where_that_is_cheap(keywords: dict[str, Any], part: dict[str, Any]):
    judged = string(**keywords)
    assert (judged.part, judged.notes, judged.refusal) == ({"type": "string", **part}, [], "")


def test_a_length_that_would_slow_decoding_down_is_verified():
    judged = string(r"^\S", maxLength=255)
    assert [(keyword, status) for keyword, status, _ in judged.notes] == [("maxLength", "verified")]
    assert "maxLength" not in judged.part
    assert string(r"^\S", maxLength=64).status == "exact"


def test_lengths_count_characters():
    judged = string(minLength=2, maxLength=2)
    assert judged.wrong(["😀😀", "😀", "e\u0301", "\n\t", "a", "abc"]) == []


# formats


@pytest.mark.parametrize("kind", ["date", "ipv4", "ipv6", "uuid", "email", "idn-email"])
@given(st.integers(0, 100_000))
@settings(max_examples=40, deadline=None)
def test_a_format_admits_nothing_that_its_checker_refuses(kind: str, seed: int):
    rng = random.Random(seed)
    pieces = {
        "date": ["2024", "1900", "0000", "-", "-02", "-29", "-30", "-13", "-01", "1", "\n"],
        "ipv4": ["0", "255", "256", "01", "1", ".", ".", ".", "9.9"],
        "ipv6": ["::", ":", ":", "0", "ffff", "12345", "1.2.3.4", "abcd:", "%eth0"],
        "uuid": ["0123abcd", "-0123", "-", "0123456789ab", "{", "4", "-4000-8000"],
    }.get(kind, ["a", "@", "b.c", " ", ".", "é", "[1.2.3.4]"])
    judged = string(format=kind)
    assert judged.status == "exact"
    for _ in range(20):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 6)))
        assert CHECKER.conforms(text, kind) or not judged.accepts(json.dumps(text, ensure_ascii=False)), text


@given(st.integers(0, 2**128 - 1), st.integers(0, 2**128 - 1), st.dates(), st.uuids())
@settings(max_examples=30, deadline=None)
def test_a_format_admits_what_python_writes(bits: int, mask: int, day: Any, name: Any):
    for kind, value in {
        "ipv6": ipaddress.IPv6Address(bits & mask),
        "ipv4": ipaddress.IPv4Address(bits & 0xFFFF_FFFF),
        "date": day,
        "uuid": name,
    }.items():
        assert string(format=kind).accepts(f'"{value}"') or (kind == "ipv6" and "." in str(value))


@pytest.mark.parametrize(
    ("kind", "status"), [("regex", "verified"), ("idn-hostname", "verified"), ("iban", "exact"), ("int32", "exact")]
)
def test_a_format_without_a_grammar_is_verified_if_it_is_checked_at_all(kind: str, status: str):
    judged = string(format=kind)
    assert [(keyword, found) for keyword, found, _ in judged.notes] == [("format", status)]
    assert judged.part == {"type": "string"}


def test_a_format_and_a_pattern_hold_both():
    judged = string("^2024", format="date")
    assert judged.wrong(["2024-02-29", "2023-02-28", "2024-02-30"]) == []
    assert judged.accepts('"2024-02-29"')


def test_string_keywords_say_nothing_about_other_types():
    assert Judged({"type": "integer", "pattern": r"(a)\1", "format": "regex", "maxLength": 2}).part == {
        "type": "integer"
    }
    judged = Judged({"pattern": "^a$", "maxLength": 3})
    assert judged.wrong(["a", "b", 3, None, [], {"a": 1}]) == []


@pytest.mark.parametrize(
    "pattern",
    [
        r'^a[^"]b$',
        r"^a[^\\]b$",
        r'^a[^"\\]*b$',
        r'^a[^\w"]b$',
        r"^a[\x00-\x1f]b$",
        r'^a[^"\n]b$',
        r'^a[^"\t\r\f]b$',
        r'^(?!a")',
    ],
)
def test_a_class_without_the_quote_or_the_backslash_admits_neither_as_an_escape(pattern: str):
    judged = string(pattern)
    for text in ('a"b', "a\\b", "a\nb", "a/b", "a\x01b", 'a"'):
        assert judged.accepts(json.dumps(text)) == bool(re.search(pattern, text)), text
