"""The prefix tree: which token prefixes have their KV in a page, page by page.
 A node is one page: a full one (`page_size` ids), which may have children, or a partial one (the tail of a
finished conversation), which is always a leaf and is reused by copying. A full page is read in place by
everybody who matched it. A page that is evicted may go to the host's memory: its node stays, below all that are on the
device, and whoever matches it brings it back by a copy instead of computing it.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from agentkit.runtime.host import HostPool
from agentkit.runtime.pages import Corruption, Owner, PagePool

_NO_PAGE = -1
#: The heaps of leaves: on the device those that nobody pins and the pinned ones, and those on the host.
_PLAIN, _PINNED, _HOST = range(3)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading ids are the same."""
    for at, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return at
    return min(len(left), len(right))


@dataclass(slots=True, eq=False)
class Node:
    """One page of a cached prefix, on the device or on the host; a root (one per namespace) has no page and no ids."""

    namespace: str
    parent: Node | None
    ids: tuple[int, ...]
    page: int
    depth: int  # full pages from the root to here, this one included
    used: int
    locks: int = 0
    alive: bool = True
    slot: int | None = None  # on the host, where it is instead of in `page`; then all its descendants are there too
    resident: int = 0  # children on the device
    pins: set[Hold] = field(default_factory=set["Hold"])  # of the paths that end here
    queued: Leaf | None = None  # the one entry of the eviction heaps that counts for this node
    children: dict[tuple[int, ...], Node] = field(default_factory=dict[tuple[int, ...], "Node"])
    order: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])  # the children's ids, sorted

    def path(self) -> list[Node]:
        """The nodes from below the root down to this one."""
        nodes: list[Node] = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


@dataclass(slots=True, eq=False)
class Hold:
    """A pinned path, by its deepest node. It moves up when that is evicted all the same; None: nothing is left."""

    node: Node | None


class Leaf(NamedTuple):
    """An entry of an eviction heap: out of date unless its node refers to it."""

    used: int
    serial: int  # no two are equal, so nodes are never compared
    node: Node
    heap: int


@dataclass(frozen=True, slots=True)
class Spill:
    """Copy a page to a slot of the host. The page may be written to again as soon as that has begun."""

    page: int
    slot: int


@dataclass(frozen=True, slots=True)
class Tail:
    """A page, here or on the host, whose first ``n`` tokens continue a match: to be copied, not shared; lock it until
    then."""

    node: Node
    n: int


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: ``n_tokens`` ids in full ``pages`` down to ``node``, then full pages on the host,
    perhaps a tail."""

    node: Node
    pages: list[int]
    n_tokens: int
    host: list[Node]
    tail: Tail | None

    @property
    def reach(self) -> int:
        """Ids that are cached, those counted that are on the host or that only a tail holds."""
        on_host = sum(len(node.ids) for node in self.host)
        return self.n_tokens + on_host + (self.tail.n if self.tail is not None else 0)

    def nodes(self) -> list[Node]:
        """Whose pages hold them, in order."""
        return [*self.node.path(), *self.host, *([self.tail.node] if self.tail is not None else [])]


class PrefixTree:
    """A radix tree over full pages, one root per namespace, with least-recently-used eviction of unlocked
    leaves.

    What must not be mixed (model, adapter, salt, KV dtype) belongs in the namespace: roots share nothing.
    Only the deepest node of a sequence is locked, since a node with children is never evicted. Whoever calls
    `match` locks what it keeps before anything else can evict. A pin is weaker than a lock: the leaves of pinned
    paths are evicted like others, but only when no other leaf is left, so nothing ever waits for a pin.

    With room on the host, eviction moves a page there instead of forgetting it, and forgets the least recently used
    pages there to make room. A leaf is then what has no children on the device.

    Args:
        pool: of the device.
        page_size: tokens in a page.
        host: room for evicted pages; none by default.
    """

    def __init__(self, pool: PagePool, page_size: int, host: HostPool | None = None) -> None:
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, not {page_size}")
        self.pool = pool
        self.page_size = page_size
        self.host = host or HostPool(0)
        self._slots: dict[int, Node] = {}
        self._spills: dict[int, int] = {}  # slot -> the page that is still to be copied there
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._serials = itertools.count()
        self._leaves: tuple[list[Leaf], list[Leaf], list[Leaf]] = ([], [], [])

    def match(self, namespace: str, ids: Sequence[int], limit: int) -> Match:
        """Find the longest cached prefix of ``ids[:limit]`` and mark it as just used.

        Give ``limit = len(ids) - 1`` so that one token is left to compute: its logits are what the caller
        wants. O(limit + log children): the tail is found among the two sorted neighbours of the remaining
        ids.
        """
        size = self.page_size
        node = deepest = self._root(namespace)
        pages: list[int] = []
        host: list[Node] = []
        start = 0
        while start + size <= limit:
            child = node.children.get(tuple(ids[start : start + size]))
            if child is None:
                break
            node = child
            if node.slot is None:
                pages.append(node.page)
                deepest = node
            else:
                host.append(node)
            node.used = self._tick()
            start += size
        tail = _longest_tail(node, tuple(ids[start : min(start + size, limit)]))
        if tail is not None:
            tail.node.used = self._tick()
        return Match(deepest, pages, len(pages) * size, host, tail)

    def look(self, namespace: str, ids: Sequence[int]) -> Match:
        """`match` all ids, for those who lock nothing and publish nothing below."""
        match = self.match(namespace, ids, len(ids))
        self._offer(match.node)  # a root that has just been made for nothing is forgotten
        return match

    def lock(self, node: Node) -> None:
        """Keep ``node`` and its ancestors from eviction until a matching `unlock`."""
        if not node.alive:
            raise Corruption(f"page {node.page} is locked after its eviction")
        node.locks += 1

    def unlock(self, node: Node) -> None:
        """Undo one `lock`; the node counts as just used."""
        if node.locks < 1:
            raise Corruption(f"page {node.page} is unlocked more often than it was locked")
        node.locks -= 1
        node.used = self._tick()
        self._offer(node)

    def pin(self, namespace: str, ids: Sequence[int]) -> Hold:
        """Evict what is cached of ``ids`` only after all that is not pinned, until `unpin`.

        The pages of this moment that are on the device are meant, a partial one at the end included; what replaces
        that one by more of the same ids is pinned in its place.
        """
        match = self.look(namespace, ids)
        hold = Hold(None)
        tail = match.tail
        self._hold(hold, tail.node if tail is not None and tail.node.slot is None else match.node)
        return hold

    def unpin(self, hold: Hold) -> None:
        """Undo one `pin`; a second time does nothing. What it held counts as just used."""
        node, hold.node = hold.node, None
        if node is not None:
            node.pins.remove(hold)
            node.used = self._tick()
            self._offer(node)

    def insert(self, namespace: str, node: Node | None, ids: Sequence[int], page: int) -> tuple[Node, bool]:
        """Publish one full page whose KV has been computed, below ``node`` (None: below the namespace's
        root).

        Returns:
            The child, and whether the tree took the page. If the child was on the device already, it keeps its own
            page and the caller keeps ``page`` as its private duplicate.
        """
        key = tuple(ids)
        if len(key) != self.page_size:
            raise Corruption(f"a full page has {self.page_size} ids, not {len(key)}")
        parent = node if node is not None else self._root(namespace)
        child = parent.children.get(key)
        if child is not None:
            child.used = self._tick()
            return child, self._promote(child, page)
        child = self._attach(parent, key, page)
        self._drop_covered(parent, key)
        return child, True

    def insert_tail(self, node: Node, ids: Sequence[int], page: int) -> bool:
        """Publish a partial page below ``node``; False, and the page stays the caller's, if a child covers it
        already.

        A partial page that is a strict prefix of the new one is replaced by it.
        """
        key = tuple(ids)
        if not 0 < len(key) < self.page_size:
            raise Corruption(f"a partial page has 1 to {self.page_size - 1} ids, not {len(key)}")
        at = bisect_left(node.order, key)
        if at < len(node.order) and node.order[at][: len(key)] == key:
            child = node.children[node.order[at]]
            child.used = self._tick()
            return child.ids == key and self._promote(child, page)
        self._attach(node, key, page)
        self._drop_covered(node, key)
        return True

    def evict(self, n: int) -> int:
        """Free up to ``n`` pages of unlocked leaves, least recently used first, pinned ones last; returns how many.

        Where the host has room for them, they are copied there: see `take_spills`.
        """
        freed = 0
        while freed < n and (node := self._next(_PLAIN) or self._next(_PINNED)) is not None:
            slot = self._make_room()
            if slot is None:
                self._remove(node)
            else:
                self._spill(node, slot)
            freed += 1
        return freed

    def take_spills(self) -> list[Spill]:
        """The copies to the host that evictions have asked for since the last call.

        Whoever takes them has them run before anything else is written to a page, and calls `forget` if they fail.
        """
        spills = [Spill(page, slot) for slot, page in self._spills.items()]
        self._spills.clear()
        return spills

    def forget(self, spills: Sequence[Spill]) -> None:
        """Drop what was to be copied to the host and may not have been, and what lies there below it."""
        for spill in spills:
            if spill.slot in self._slots:
                self._remove(self._slots[spill.slot])

    def clear(self) -> None:
        """Forget everything, locked and pinned or not, and free every page, the private ones of sequences too.

        For one who has lost track. Nodes that are still referred to are dead; a pin of them holds nothing.
        """
        for node in list(self.nodes()):
            node.alive, node.queued = False, None
        for index in (self._roots, self._slots, self._spills, *self._leaves):
            index.clear()
        self.pool.clear()
        self.host.clear()

    def nodes(self) -> Iterator[Node]:
        """Every node, roots included. Walks the tree: for checks and state dumps."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self, locks: Mapping[Node, int]) -> None:
        """Raise `Corruption` unless the structure is sound and every lock count is that in ``locks``."""
        pages: set[int] = set()
        seen: set[Node] = set()
        for node in self.nodes():
            seen.add(node)
            self._check_node(node, locks.get(node, 0))
            if node.parent is not None and node.slot is None:
                pages.add(node.page)
        if missing := [node.page for node, count in locks.items() if count and node not in seen]:
            raise Corruption(f"locked pages {missing} are not in the tree")
        on_host = {node.slot: node for node in seen if node.slot is not None}
        in_tree = len(seen) - len(self._roots) - len(on_host)
        if len(pages) != in_tree or in_tree != self.pool.tree:
            raise Corruption(f"{in_tree} nodes hold {len(pages)} pages, the pool counts {self.pool.tree} tree pages")
        if on_host != self._slots or len(on_host) != self.host.used or not self._spills.keys() <= on_host.keys():
            raise Corruption(f"slots {sorted(on_host)} are in the tree, {sorted(self._slots)} in its index")

    def _check_node(self, node: Node, locks: int) -> None:
        where = f"page {node.page} of namespace {node.namespace!r}"
        if node.locks != locks or not node.alive:
            raise Corruption(f"{where} has {node.locks} locks instead of {locks}, or is dead (alive={node.alive})")
        if node.order != sorted(node.children):
            raise Corruption(f"{where}: the sorted index differs from the children")
        if node.parent is None:
            return
        self._check_place(node, where)
        full = len(node.ids) == self.page_size
        if node.parent.children.get(node.ids) is not node or node.depth != node.parent.depth + full:
            raise Corruption(f"{where} is not linked to its parent")
        if not full and (node.children or not node.ids):
            raise Corruption(f"{where} is partial and has children, or has no ids")
        heap = _heap(node)
        if heap is not None and (node.queued is None or node.queued.heap != heap):
            raise Corruption(f"{where} can be evicted, but its eviction heap does not know it")

    def _check_place(self, node: Node, where: str) -> None:
        """A node is in a page of the tree below such nodes, or in a slot of the host with all that is below it."""
        assert node.parent is not None
        resident = sum(child.slot is None for child in node.children.values())
        if node.slot is not None and (node.page != _NO_PAGE or resident or node.pins):
            raise Corruption(f"{where} is on the host, yet has a page, pins or children on the device")
        if node.slot is None and (node.parent.slot is not None or self.pool.owner(node.page) != Owner.TREE):
            raise Corruption(f"{where} is {self.pool.owner(node.page).name}, not TREE, or lies below the host")
        if node.resident != resident or any(hold.node is not node for hold in node.pins):
            raise Corruption(f"{where} counts {node.resident} of {resident} children, or has pins that are elsewhere")

    def _root(self, namespace: str) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(namespace, None, (), _NO_PAGE, 0, 0)
        return root

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _attach(self, parent: Node, key: tuple[int, ...], page: int) -> Node:
        if not parent.alive or parent.slot is not None:
            raise Corruption(f"page {page} is published below a page that has been evicted")
        self.pool.adopt(page)
        parent.resident += 1
        depth = parent.depth + (len(key) == self.page_size)
        child = Node(parent.namespace, parent, key, page, depth, self._tick())
        parent.children[key] = child
        insort(parent.order, key)
        self._offer(child)
        return child

    def _drop_covered(self, parent: Node, key: tuple[int, ...]) -> None:
        """Remove the unlocked partial pages that ``key``, just attached, extends: it takes their place."""
        for length in range(1, len(key)):
            child = parent.children.get(key[:length])
            if child is not None and not child.locks:
                for hold in list(child.pins):
                    self._hold(hold, parent.children[key])
                self._remove(child)

    def _hold(self, hold: Hold, node: Node) -> None:
        """Make a hold that of the path to ``node``; a root has no page to hold."""
        if hold.node is not None:
            hold.node.pins.remove(hold)
        hold.node = node if node.parent is not None else None
        if hold.node is not None:
            node.pins.add(hold)
            self._offer(node)

    def _promote(self, node: Node, page: int) -> bool:
        """Let a node that is on the host have a page with the same content; False if it is on the device."""
        if node.slot is None:
            return False
        assert node.parent is not None
        self.pool.adopt(page)
        self._vacate(node)
        node.page = page
        node.parent.resident += 1
        self._offer(node)
        return True

    def _spill(self, node: Node, slot: int) -> None:
        """Move a leaf to the host."""
        assert node.parent is not None
        self._spills[slot] = node.page
        self._slots[slot] = node
        node.slot = slot
        self._leave_device(node)
        self._offer(node)

    def _make_room(self) -> int | None:
        """A slot of the host, by forgetting what was least recently used there; None if there is none to be had."""
        slot = self.host.allocate()
        if slot is None and (node := self._next(_HOST)) is not None:
            self._remove(node)
            slot = self.host.allocate()
        return slot

    def _next(self, heap: int) -> Node | None:
        """Take the least recently used leaf off a heap."""
        leaves = self._leaves[heap]
        while leaves:
            leaf = heapq.heappop(leaves)
            node = leaf.node
            if node.queued is not leaf:
                continue
            node.queued = None
            if leaf.used != node.used:
                self._offer(node)
            elif _heap(node) == heap:
                return node
        return None

    def _remove(self, node: Node) -> None:
        """Forget a node, and what lies on the host below it."""
        doomed = [node]
        for one in doomed:
            doomed += one.children.values()
        for one in reversed(doomed):
            self._forget(one)

    def _forget(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        if node.locks or node.children:
            raise Corruption(f"page {node.page}, slot {node.slot} is forgotten while it is in use")
        del parent.children[node.ids]
        del parent.order[bisect_left(parent.order, node.ids)]
        node.alive, node.queued = False, None
        if node.slot is None:
            self._leave_device(node)
        else:
            self._vacate(node)
            self._offer(parent)

    def _leave_device(self, node: Node) -> None:
        """Free a node's page; its pins go to its parent, which is a leaf now or in use."""
        parent = node.parent
        assert parent is not None
        for hold in list(node.pins):
            self._hold(hold, parent)
        self.pool.release(node.page)
        node.page = _NO_PAGE
        parent.resident -= 1
        parent.used = max(parent.used, node.used)  # a prefix is in use whenever what follows it is
        self._offer(parent)

    def _vacate(self, node: Node) -> None:
        """Free a node's slot."""
        assert node.slot is not None
        del self._slots[node.slot]
        self._spills.pop(node.slot, None)
        self.host.release(node.slot)
        node.slot = None

    def _offer(self, node: Node) -> None:
        """Queue ``node`` for eviction if it may be evicted now; an empty root is forgotten instead."""
        heap = _heap(node)
        if heap is None:
            return
        if node.parent is None:
            if not node.children:
                node.alive = False
                del self._roots[node.namespace]
        elif node.queued is None or node.queued.heap != heap:
            leaves = self._leaves[heap]
            node.queued = Leaf(node.used, next(self._serials), node, heap)
            heapq.heappush(leaves, node.queued)
            if len(leaves) > 2 * (self.pool.tree + self.host.used) + 64:  # mostly out of date: dropped, or moved since
                leaves[:] = [leaf for leaf in leaves if leaf.node.queued is leaf]
                heapq.heapify(leaves)


def _heap(node: Node) -> int | None:
    """The heap that a node belongs to as a leaf; None if it must not be evicted."""
    if not node.alive or node.locks or node.resident or (node.slot is not None and node.children):
        return None
    if node.slot is not None:
        return _HOST
    return _PINNED if node.pins else _PLAIN


def _longest_tail(node: Node, rest: tuple[int, ...]) -> Tail | None:
    """The child that shares most leading ids with ``rest``: in sorted order one of two neighbours."""
    at = bisect_left(node.order, rest)
    best: Tail | None = None
    for key in node.order[max(at - 1, 0) : at + 1]:
        n = common_prefix(key, rest)
        if n > (best.n if best is not None else 0):
            best = Tail(node.children[key], n)
    return best
