"""Page pool: one owner for each page, runs of consecutive pages, exact accounts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit.runtime.pages import Corruption, Owner, PagePool


def take(pool: PagePool, after: int | None = None) -> int:
    page = pool.allocate(after)
    assert page is not None
    return page


def test_a_lone_sequence_gets_consecutive_pages() -> None:
    pool = PagePool(8)
    pages = [take(pool)]
    while (page := pool.allocate(pages[-1])) is not None:
        pages.append(page)
    assert pages == list(range(8))
    assert (pool.free, pool.private, pool.tree) == (0, 8, 0)


def test_a_new_run_starts_in_the_middle_of_the_largest_extent_so_that_both_can_grow() -> None:
    pool = PagePool(16)
    first = take(pool)
    second = take(pool)
    assert (first, second) == (0, 8)
    assert [take(pool, first), take(pool, second)] == [1, 9]
    assert take(pool) in (5, 12)  # middle of [2, 8), or of [10, 16)
    pool.check()


def test_a_blocked_run_continues_elsewhere_and_a_full_pool_gives_none() -> None:
    pool = PagePool(4)
    first, second = take(pool), take(pool)
    assert (first, second) == (0, 2)
    assert take(pool, first) == 1
    assert take(pool, 1) == 3
    assert pool.allocate(3) is None
    assert pool.allocate(None) is None


def test_released_neighbours_become_one_extent_again() -> None:
    pool = PagePool(9)
    pages = [take(pool)]
    while len(pages) < 9:
        pages.append(take(pool, pages[-1]))
    for page in (3, 5, 4, 0, 1, 8, 7, 2, 6):
        pool.release(page)
        pool.check()
    assert take(pool) == 0
    assert take(pool) == 5  # the middle of the one extent [1, 9)


def test_a_page_is_released_once() -> None:
    pool = PagePool(2)
    page = take(pool)
    pool.release(page)
    with pytest.raises(Corruption, match="released twice"):
        pool.release(page)


def test_only_private_pages_enter_the_tree() -> None:
    pool = PagePool(2)
    page = take(pool)
    pool.adopt(page)
    assert (pool.owner(page), pool.tree, pool.private) == (Owner.TREE, 1, 0)
    for wrong in (page, 1 - page):
        with pytest.raises(Corruption, match="enters the tree"):
            pool.adopt(wrong)
    pool.release(page)
    assert pool.free == 2


def test_a_run_cannot_grow_from_a_free_page() -> None:
    with pytest.raises(Corruption, match="is free"):
        PagePool(2).allocate(0)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)


def test_check_notices_a_lost_page() -> None:
    pool = PagePool(4)
    take(pool)
    pool._owner[0] = Owner.FREE
    with pytest.raises(Corruption):
        pool.check()


@given(st.integers(1, 40), st.lists(st.tuples(st.sampled_from("nncra"), st.integers(0, 40)), max_size=300))
def test_accounts_and_extents_stay_exact(total: int, events: list[tuple[str, int]]) -> None:
    pool = PagePool(total)
    owned: dict[int, Owner] = {}
    for event, pick in events:
        chosen = sorted(owned)[pick % len(owned)] if owned else None
        if event in "nc":
            after = chosen if event == "c" else None
            page = pool.allocate(after)
            assert (page is None) == (len(owned) == total)
            if page is not None:
                assert page not in owned
                if after is not None and after + 1 < total and after + 1 not in owned:
                    assert page == after + 1
                owned[page] = Owner.PRIVATE
        elif chosen is not None and event == "r":
            pool.release(chosen)
            del owned[chosen]
        elif chosen is not None and owned[chosen] == Owner.PRIVATE:
            pool.adopt(chosen)
            owned[chosen] = Owner.TREE
        pool.check()
        assert pool.free == total - len(owned)
        assert pool.tree == sum(owner == Owner.TREE for owner in owned.values())
