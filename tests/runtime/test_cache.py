"""The cache: what was used last stays, as much as fits."""

from __future__ import annotations

from agentkit.runtime.cache import Cache


def test_what_was_used_longest_ago_makes_room():
    cache: Cache[str] = Cache(10)
    cache.put("a", "A", 4)
    cache.put("b", "B", 4)
    assert cache.get("a") == "A"
    cache.put("c", "C", 4)
    assert [cache.get(key) for key in "abc"] == ["A", None, "C"]
    assert cache.held == 8


def test_the_last_one_stays_however_large_it_is():
    cache: Cache[str] = Cache(10)
    cache.put("a", "A", 4)
    cache.put("b", "B", 100)
    assert (cache.get("a"), cache.get("b"), cache.held) == (None, "B", 100)


def test_a_value_that_is_replaced_or_dropped_counts_no_more():
    cache: Cache[str] = Cache(10)
    cache.put("a", "A", 4)
    cache.put("a", "AA", 5)
    assert (cache.get("a"), cache.held) == ("AA", 5)
    cache.drop("a")
    cache.drop("a")
    assert (cache.get("a"), cache.held) == (None, 0)
