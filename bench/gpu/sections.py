"""Which sections there are, in the order in which they run. No torch here: the supervisor reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A section.

    Attributes:
        name: on the command line and in the table.
        function: ``module:function`` in this package, a generator of what it finds.
        seconds: what it takes on a card, as a plan for the time; compiling included.
        silence: seconds without a word after which it counts as hanging.
        proofs: whether it has to be complete, and goes on in a new process after a proof that this one did not survive.
        ours: whether running out of time is a failure; of a peer or a suite it is not.
        processes: how many share its work. Compiling keeps one processor busy, so proofs run side by side.
        quick: whether ``--quick`` runs it unasked.
    """

    name: str
    function: str
    seconds: float
    silence: float
    proofs: bool = False
    ours: bool = True
    processes: int = 1
    quick: bool = True


SECTIONS = (
    Entry("correctness", "correctness:run", 60, 60, proofs=True, processes=6),
    Entry("floors", "floors:run", 4, 60),
    Entry("attention-decode", "attention:decode", 35, 120),
    Entry("attention-prefill", "attention:prefill", 30, 120),
    Entry("prefix-shared", "attention:prefix_shared", 10, 60),
    Entry("sparse", "sparse:run", 20, 90),
    Entry("fp8", "attention:fp8", 10, 60),
    Entry("sampler", "sampler:run", 15, 60),
    Entry("elementwise", "elementwise:run", 15, 60),
    Entry("linear", "linear:run", 25, 90),
    Entry("decode", "decode:run", 60, 150),
    Entry("transformers", "transformers_peer:run", 75, 120, ours=False, quick=False),
    Entry("tests", "suite:run", 90, 240, ours=False, quick=False),
)
BY_NAME = {entry.name: entry for entry in SECTIONS}
