"""Prefix tree: what is matched, shared, copied, locked and evicted."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit.runtime.pages import Corruption, Owner, PagePool
from agentkit.runtime.radix import Hold, Node, PrefixTree

SIZE = 4


def build(total: int = 32) -> tuple[PagePool, PrefixTree]:
    pool = PagePool(total)
    return pool, PrefixTree(pool, SIZE)


def page_of(pool: PagePool) -> int:
    page = pool.allocate(None)
    assert page is not None
    return page


def put(tree: PrefixTree, ids: list[int], namespace: str = "") -> list[int]:
    """Publish ``ids`` as a finished conversation would; the pages of its path."""
    node = tree.match(namespace, ids, len(ids)).node
    tree.lock(node)
    first = node
    for start in range(node.depth * SIZE, len(ids) - SIZE + 1, SIZE):
        node, _ = tree.insert(namespace, node, ids[start : start + SIZE], page_of(tree.pool))
    pages = [part.page for part in node.path()]
    if rest := ids[len(ids) // SIZE * SIZE :]:
        page = page_of(tree.pool)
        if tree.insert_tail(node, rest, page):
            pages.append(page)
        else:
            tree.pool.release(page)
    tree.unlock(first)
    tree.check({})
    return pages


def test_full_pages_are_shared_and_the_rest_is_computed() -> None:
    _, tree = build()
    pages = put(tree, list(range(8)))
    match = tree.match("", [*range(8), 90, 91], 9)
    assert (match.pages, match.n_tokens, match.tail) == (pages, 8, None)
    assert match.node.depth == 2


def test_a_match_leaves_the_last_token_to_compute() -> None:
    """P8: the whole prompt is cached, yet its last token must be computed for its logits."""
    _, tree = build()
    pages = put(tree, list(range(8)))
    match = tree.match("", list(range(8)), 7)
    assert (match.pages, match.n_tokens) == (pages[:1], 4)
    assert match.tail is not None
    assert (match.tail.node.page, match.tail.n) == (pages[1], 3)
    assert tree.match("", [0], 0).tail is None


def test_a_page_that_ends_differently_is_offered_for_copying() -> None:
    _, tree = build()
    pages = put(tree, [1, 2, 3, 4, 5, 6, 7, 8])
    put(tree, [1, 2, 3, 4, 5, 9, 9, 9])
    tail = tree.match("", [1, 2, 3, 4, 5, 6, 7, 0, 0], 8).tail
    assert tail is not None
    assert (tail.node.page, tail.n) == (pages[1], 3)


def test_the_tail_of_a_finished_conversation_is_offered_for_copying() -> None:
    _, tree = build()
    pages = put(tree, [1, 2, 3, 4, 5, 6])
    match = tree.match("", [1, 2, 3, 4, 5, 6, 7], 6)
    assert match.tail is not None
    assert (match.pages, match.tail.node.page, match.tail.n) == (pages[:1], pages[1], 2)


def test_namespaces_share_nothing() -> None:
    """P7."""
    _, tree = build()
    put(tree, list(range(8)), "adapter a")
    for other in ("", "adapter b"):
        match = tree.match(other, list(range(8)), 7)
        assert (match.n_tokens, match.tail) == (0, None)


def test_a_published_page_stays_and_the_duplicate_stays_private() -> None:
    """P1."""
    pool, tree = build()
    (page,) = put(tree, [1, 2, 3, 4])
    duplicate = page_of(pool)
    node, kept = tree.insert("", None, [1, 2, 3, 4], duplicate)
    assert (node.page, kept, pool.owner(duplicate)) == (page, False, Owner.PRIVATE)
    pool.release(duplicate)
    tree.check({})


def test_a_longer_tail_replaces_its_prefix_and_a_covered_one_is_not_added() -> None:
    pool, tree = build()
    put(tree, [1])
    assert put(tree, [1, 2]) == [next(n.page for n in tree.nodes() if n.parent is not None)]
    assert pool.tree == 1
    assert put(tree, [1]) == []
    put(tree, [1, 3])
    assert pool.tree == 2
    put(tree, [1, 2, 3, 4])  # a full page covers [1, 2], not [1, 3]
    assert pool.tree == 2
    assert put(tree, [1, 2, 3]) == []


def test_a_locked_tail_is_not_replaced_while_it_is_copied() -> None:
    pool, tree = build()
    put(tree, [1, 2])
    tail = tree.match("", [1, 2, 3], 2).tail
    assert tail is not None
    tree.lock(tail.node)
    page = page_of(pool)
    root = tree.match("", [], 0).node
    assert tree.insert_tail(root, [1, 2, 3], page)
    assert pool.owner(tail.node.page) == Owner.TREE
    assert tree.evict(9) == 1
    tree.unlock(tail.node)
    assert tree.evict(9) == 1


def test_eviction_takes_the_least_recently_used_leaf_and_never_a_parent_first() -> None:
    pool, tree = build()
    old, new = [1, 1, 1, 1, 2, 2, 2, 2], [3, 3, 3, 3]
    first = put(tree, old)
    second = put(tree, new)
    tree.match("", old, 8)
    assert tree.evict(1) == 1
    assert pool.owner(second[0]) == Owner.FREE
    assert tree.evict(1) == 1
    assert [pool.owner(page) for page in first] == [Owner.TREE, Owner.FREE]
    assert tree.evict(5) == 1
    assert not list(tree.nodes())


def test_a_locked_node_protects_its_ancestors() -> None:
    pool, tree = build()
    put(tree, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3])
    match = tree.match("", [1, 1, 1, 1, 2, 2, 2, 2], 8)
    tree.lock(match.node)
    assert tree.evict(9) == 1
    assert pool.tree == 2
    tree.check({match.node: 1})
    with pytest.raises(Corruption, match="locks"):
        tree.check({})
    tree.unlock(match.node)
    assert tree.evict(9) == 2


def test_lock_errors_are_noticed() -> None:
    _, tree = build()
    put(tree, [1, 1, 1, 1])
    node = tree.match("", [1, 1, 1, 1], 4).node
    with pytest.raises(Corruption, match="unlocked more often"):
        tree.unlock(node)
    tree.evict(1)
    with pytest.raises(Corruption, match="after its eviction"):
        tree.lock(node)


def test_pages_of_the_wrong_length_are_refused() -> None:
    pool, tree = build()
    page = page_of(pool)
    root = tree.match("", [], 0).node
    with pytest.raises(Corruption, match="full page"):
        tree.insert("", None, [1, 2, 3], page)
    for ids in ([], [1, 2, 3, 4]):
        with pytest.raises(Corruption, match="partial page"):
            tree.insert_tail(root, ids, page)


def test_replaced_tails_do_not_pile_up_in_the_eviction_heap() -> None:
    pool, tree = build()
    for turn in range(400):  # each turn's tail is dropped when the next one extends it, and nothing is ever evicted
        put(tree, [turn, 1])
        put(tree, [turn, 1, 2])
        if pool.free < 4:
            tree.evict(8)
    assert sum(map(len, tree._leaves)) <= 2 * (2 * pool.tree + 64)


def test_pinned_paths_are_evicted_last_and_then_like_others() -> None:
    pool, tree = build()
    pinned, other = [1, 1, 1, 1, 2, 2, 2, 2, 3], [4, 4, 4, 4, 5, 5]
    pages, others = put(tree, pinned), put(tree, other)
    holds = [tree.pin("", pinned), tree.pin("", pinned)]  # counted
    tree.match("", other, 6)  # the pinned path is the least recently used
    assert tree.evict(1) == 1
    assert pool.owner(others[1]) == Owner.FREE
    tree.unpin(holds.pop())
    put(tree, other)
    assert tree.evict(2) == 2
    assert [pool.owner(page) for page in pages] == [Owner.TREE] * 3
    assert tree.evict(1) == 1  # nothing else is left, so the pin gives way, its last page first
    assert [pool.owner(page) for page in pages] == [Owner.TREE, Owner.TREE, Owner.FREE]
    put(tree, other)
    assert tree.evict(2) == 2  # what is left of the path is pinned still
    assert [pool.owner(page) for page in pages[:2]] == [Owner.TREE, Owner.TREE]
    tree.unpin(holds[0])
    tree.unpin(holds[0])
    put(tree, other)
    assert tree.evict(1) == 1
    assert pool.owner(pages[1]) == Owner.FREE
    tree.check({})


def test_a_pinned_tail_that_grows_stays_pinned() -> None:
    pool, tree = build()
    put(tree, [1, 2])
    hold = tree.pin("", [1, 2])
    (page,) = put(tree, [1, 2, 3])
    put(tree, [5])
    tree.match("", [5], 1)
    assert tree.evict(1) == 1
    assert pool.owner(page) == Owner.TREE
    tree.unpin(hold)
    assert tree.evict(1) == 1


def test_a_pin_of_what_is_not_cached_holds_nothing() -> None:
    _, tree = build()
    hold = tree.pin("nobody", [1, 2, 3])
    assert not list(tree.nodes())
    tree.unpin(hold)


def test_pins_and_unpins_do_not_pile_up_in_the_eviction_heaps() -> None:
    _, tree = build()
    put(tree, [1, 2, 3, 4])
    for _ in range(400):
        tree.unpin(tree.pin("", [1, 2, 3, 4]))
    assert sum(map(len, tree._leaves)) <= 2 * (2 + 64)


ids = st.lists(st.integers(0, 2), max_size=14)


@given(st.lists(ids, max_size=14), ids, st.integers(0, 6))
def test_match_finds_what_a_search_over_everything_finds(
    cached: list[list[int]], query: list[int], evicted: int
) -> None:
    _, tree = build(200)
    for one in cached:
        put(tree, one)
    tree.evict(evicted)
    tree.check({})
    limit = max(len(query) - 1, 0)
    match = tree.match("", query, limit)
    reached = match.n_tokens + (match.tail.n if match.tail else 0)
    stored = [[token for part in node.path() for token in part.ids] for node in tree.nodes()]
    assert reached == max((common(one, query[:limit]) for one in stored), default=0)
    assert match.n_tokens == max((common(one, query[:limit]) // SIZE * SIZE for one in stored), default=0)


@given(
    st.lists(ids, max_size=10),
    st.lists(st.tuples(st.sampled_from(["pin", "unpin", "put", "evict", "lock"]), ids, st.integers(0, 4)), max_size=16),
)
def test_eviction_takes_what_a_search_over_everything_takes(
    cached: list[list[int]], events: list[tuple[str, list[int], int]]
) -> None:
    pool, tree = build(200)
    for one in cached:
        put(tree, one)
    holds: list[Hold] = []
    locks: Counter[Node] = Counter()
    for what, one, n in events:
        if what == "pin":
            holds.append(tree.pin("", one))
        elif what == "unpin" and holds:
            tree.unpin(holds.pop(n % len(holds)))
        elif what == "put" and not locks:
            put(tree, one)
        elif what == "lock":
            node = tree.match("", one, len(one)).node
            tree.lock(node)
            locks[node] += 1
        elif what == "evict":
            expected = searched(tree, n)
            assert tree.evict(n) == len(expected)
            assert all(pool.owner(page) == Owner.FREE for page in expected)
        tree.check(locks)


def searched(tree: PrefixTree, n: int) -> list[int]:
    """The pages that shall go, found by looking at all of them each time."""
    nodes = [node for node in tree.nodes() if node.parent is not None]
    used = {node: node.used for node in tree.nodes()}
    held = {part for node in nodes if node.pins for part in node.path()}
    gone: list[Node] = []
    while len(gone) < n:
        leaves = [x for x in nodes if x not in gone and not x.locks and all(c in gone for c in x.children.values())]
        if not leaves:
            break
        leaf = min(leaves, key=lambda node: (node in held, used[node]))
        gone.append(leaf)
        assert leaf.parent is not None
        used[leaf.parent] = max(used[leaf.parent], used[leaf])
    return [node.page for node in gone]


@given(st.lists(ids, max_size=10), st.lists(st.integers(0, 9), max_size=6))
def test_eviction_frees_all_but_locked_paths(cached: list[list[int]], chosen: list[int]) -> None:
    pool, tree = build(100)
    for one in cached:
        put(tree, one)
    locks: Counter[Node] = Counter()
    for pick in chosen:
        if cached:
            one = cached[pick % len(cached)]
            locks[tree.match("", one, len(one)).node] += 1
    for node in locks.elements():
        tree.lock(node)
    tree.check(locks)
    kept = {part.page for node in locks for part in node.path()}
    before = pool.tree
    assert tree.evict(1000) == before - len(kept)
    assert {page for page in range(100) if pool.owner(page) == Owner.TREE} == kept
    for node in locks.elements():
        tree.unlock(node)
    tree.evict(1000)
    assert pool.free == 100


def common(left: list[int], right: list[int]) -> int:
    n = 0
    while n < min(len(left), len(right)) and left[n] == right[n]:
        n += 1
    return n
