"""How long the texts are that a pattern allows, and lengths written into a pattern."""

from __future__ import annotations

from dataclasses import replace

from agentkit.runtime.schema.patterns import REST, Edge, Either, Join, Node, Repeat, Set, joined, parts


def span(node: Node) -> tuple[int, int | None]:
    """Least and greatest number of characters that `node` alone takes; None for no bound."""
    match node:
        case Set():
            return 1, 1
        case Join(inner):
            spans = [span(part) for part in inner]
            return sum(low for low, _ in spans), _total([high for _, high in spans])
        case Either(inner):
            spans = [span(part) for part in inner]
            highs = [high for _, high in spans]
            return min(low for low, _ in spans), None if None in highs else max(h for h in highs if h is not None)
        case Repeat(inner, low, high):
            least, most = span(inner)
            if high == 0 or most == 0:
                return 0, 0
            return low * least, None if high is None or most is None else high * most
        case _:
            return 0, 0


def _total(highs: list[int | None]) -> int | None:
    return None if None in highs else sum(high for high in highs if high is not None)


def closed(node: Node) -> Node:
    """A searched pattern as one that matches whole texts: with ``^`` and ``$`` at its ends, and anything there else.

    Only for a pattern without anchors within; those make it `open` at an end it could not reach.
    """
    inner = list(parts(node))
    first = [Edge(False)] if inner[:1] == [Edge(False)] else [Edge(False), REST]
    last = [Edge(True)] if inner[-1:] == [Edge(True)] else [REST, Edge(True)]
    middle = [part for part in inner if not isinstance(part, Edge)]
    return joined([*first, *middle, *last])


def anchored(node: Node) -> bool:
    """Whether every anchor stands at one of the two ends."""
    inner = parts(node)
    return (
        not any(_anchors(part) for part in inner[1:-1])
        and all(isinstance(part, Edge) or not _anchors(part) for part in (*inner[:1], *inner[-1:]))
        and (len(inner) < 2 or (inner[0] != Edge(True) and inner[-1] != Edge(False)))
    )


def _anchors(node: Node) -> bool:
    match node:
        case Edge():
            return True
        case Join(inner) | Either(inner):
            return any(map(_anchors, inner))
        case Repeat(inner):
            return _anchors(inner)
        case _:
            return False


def counted(node: Node, least: int, most: int | None) -> Node | None:
    """A `closed` pattern whose texts have `least` to `most` characters, where its one unbounded class can count them.

    None for a pattern of another shape.
    """
    inner = parts(node)
    loops = [i for i, part in enumerate(inner) if isinstance(part, Repeat) and part.high is None]
    if len(loops) != 1:
        return None
    loop = inner[loops[0]]
    rest = [span(part) for i, part in enumerate(inner) if i != loops[0]]
    if not isinstance(loop, Repeat) or not isinstance(loop.node, Set) or any(low != high for low, high in rest):
        return None
    fixed = sum(low for low, _ in rest)
    bounded = replace(loop, low=max(loop.low, least - fixed), high=None if most is None else most - fixed)
    if bounded.high is not None and bounded.high < bounded.low:
        return None
    return joined([*inner[: loops[0]], bounded, *inner[loops[0] + 1 :]])
