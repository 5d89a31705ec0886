"""Moving what is cached of a conversation out of an engine and into one, a few pages at a time between its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from agentkit.runtime.kv import PagedKV
from agentkit.runtime.radix import Node, PrefixTree

T = TypeVar("T")


class Ask(Protocol):
    """Runs something on the engine's thread and waits for its result. EngineError if the engine has closed."""

    def __call__(self, question: Callable[[], T]) -> T: ...


def settle(tree: PrefixTree, kv: PagedKV) -> None:
    """Copy to the host what evictions have asked for; before anything is written to the pages that they have freed."""
    spills = tree.take_spills()
    try:
        kv.spill(spills)
    except BaseException:
        tree.forget(spills)
        raise


class Export:
    """Reads what is cached of some ids; see `Engine.exporter`. Whoever reads pins them.

    Args:
        ask: reaches the thread that tree and KV belong to.
        ids: of the conversation.
        namespace: as of a `Request`.

    Attributes:
        tokens: how many of the ids are cached, from the first one on.
    """

    def __init__(self, ask: Ask, tree: PrefixTree, kv: PagedKV, ids: Sequence[int], namespace: str) -> None:
        self._ask, self._tree, self._kv = ask, tree, kv
        match = ask(lambda: tree.look(namespace, ids))
        self._nodes, self.tokens = match.nodes(), match.reach

    def read(self, first: int, count: int) -> Tensor:
        """Blocks of up to ``count`` pages from page ``first`` on, ``[n, *PagedKV.block_shape]`` on the CPU.

        What a page holds behind `tokens` is of others, and comes out as zeros. There are fewer blocks than asked for
        at the end, and where a page has been evicted meanwhile.
        """
        return self._ask(lambda: self._read(first, count))

    def _read(self, first: int, count: int) -> Tensor:
        nodes = self._nodes[first : first + count]
        alive = next((i for i, node in enumerate(nodes) if not node.alive), len(nodes))
        blocks = self._blocks(nodes[:alive])
        if alive and first + alive == len(self._nodes):
            blocks[-1, :, self.tokens - (len(self._nodes) - 1) * self._kv.format.page_size :] = 0
        return blocks

    def _blocks(self, nodes: Sequence[Node]) -> Tensor:
        """Their pages, from wherever they are."""
        on_host = next((i for i, node in enumerate(nodes) if node.slot is not None), len(nodes))
        blocks = self._kv.read([node.page for node in nodes[:on_host]])
        if on_host == len(nodes):
            return blocks
        settle(self._tree, self._kv)
        below = self._kv.read_host([node.slot for node in nodes[on_host:] if node.slot is not None])
        return torch.cat([blocks, below])


class Import:
    """Publishes KV that was computed elsewhere as the cached prefix of some ids; see `Engine.importer`.

    Pages are taken like any others, by evicting where none is free. Nothing is locked between two calls.

    Args:
        ask: reaches the thread that tree and KV belong to.
        ids: of the conversation.
        namespace: as of a `Request`.

    Attributes:
        tokens: how many of the ids are cached in pages of their own, from the first one on.
    """

    def __init__(self, ask: Ask, tree: PrefixTree, kv: PagedKV, ids: Sequence[int], namespace: str) -> None:
        self._ask, self._tree, self._kv, self._ids = ask, tree, kv, ids
        self._namespace = namespace
        match = ask(lambda: tree.look(namespace, ids))
        self._node, self.tokens = match.node, match.n_tokens

    def write(self, blocks: Tensor, tokens: int) -> bool:
        """Go on with the blocks that follow `tokens`; the last of them holds no more than to id ``tokens``.

        Returns:
            Whether all of them are cached now. If not, no page could be had for the rest, or what stood before them
            has been evicted: there is no use in giving more.
        """
        return self._ask(lambda: self._write(blocks, tokens))

    def _write(self, blocks: Tensor, tokens: int) -> bool:
        node, tree, size = self._node, self._tree, self._tree.page_size
        if node.parent is None:  # a root without children is forgotten
            node = tree.match(self._namespace, (), 0).node
        if not node.alive or node.slot is not None:
            return False
        tree.lock(node)
        locked = node
        pages = self._take(len(blocks))
        try:
            settle(tree, self._kv)
            self._kv.write(pages, blocks[: len(pages)])
            while pages:
                part = self._ids[self.tokens : min(self.tokens + size, tokens)]
                if len(part) == size:
                    node, kept = tree.insert(self._namespace, node, part, pages[0])
                else:
                    kept = tree.insert_tail(node, part, pages[0])
                page = pages.pop(0)
                if not kept:
                    tree.pool.release(page)
                self.tokens += len(part)
        finally:
            for page in pages:
                tree.pool.release(page)
            tree.unlock(locked)
        self._node = node
        return self.tokens == tokens

    def _take(self, count: int) -> list[int]:
        """Up to so many private pages."""
        pool = self._tree.pool
        if pool.free < count:
            self._tree.evict(count - pool.free)
        pages: list[int] = []
        while len(pages) < count and (page := pool.allocate(pages[-1] if pages else None)) is not None:
            pages.append(page)
        return pages
