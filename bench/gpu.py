"""The Triton kernels on a GPU: proved against torch, then measured beside floors and peers; whole-model decode.

    python bench/gpu.py [--quick] [--json FILE] [--markdown FILE] [--only SECTION ...] [--seconds N]
    python bench/gpu.py --rehearse      on a CPU: the whole program in Triton's interpreter, on toy shapes

Nothing needs to be installed but torch, Triton and numpy (transformers for its peer): the folders of this repository
are imported where they lie. It takes under 9 minutes on one card. Sections run in processes of their own, so that a
kernel that faults or hangs costs one section. A failed check or section makes the exit status 1; a missed target is
marked in the table. A rehearsal executes every path but the timing; its numbers mean nothing and say so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu.process import Order
from bench.gpu.sections import SECTIONS
from bench.gpu.supervisor import supervise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cases and repetitions, no peers that compile")
    parser.add_argument("--json", type=Path, help="write everything to this file, anew after each section")
    parser.add_argument("--markdown", type=Path, help="write the table to this file, anew after each section")
    names = [entry.name for entry in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=f"of {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, in Triton's interpreter")
    parser.add_argument("--seconds", type=float, default=520, help="time for all of it (default 520)")
    args = parser.parse_args()
    chosen = [entry for entry in SECTIONS if entry.name in args.only] if args.only else [
        entry for entry in SECTIONS if entry.quick or not args.quick
    ]  # fmt: skip
    order = Order(chosen, args.quick, args.rehearse, args.seconds, args.json, args.markdown)
    report = supervise(order)
    print(report.markdown().rstrip())
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
