"""``agentkit models``: get, list and check models."""

from __future__ import annotations

import argparse
import sys

from agentkit import models


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the commands of ``agentkit models``."""
    parser.description = "Get, list and check models. Only pull uses the network."
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    pull = commands.add_parser("pull", help="fetch a model unless it is here and intact")
    pull.add_argument("name", metavar="NAME", help="smollm2-135m, or a Hugging Face model as org/name")
    pull.set_defaults(command=_pull)
    commands.add_parser("list", help="list the models on this machine").set_defaults(command=_list)
    check = commands.add_parser("check", help="read a model's headers and say what is in it")
    check.add_argument("name", metavar="NAME", help="a name, a folder or a .gguf file")
    check.set_defaults(command=_check)


def _pull(args: argparse.Namespace) -> int:
    print(models.pull(args.name, progress=sys.stderr.isatty()))
    return 0


def _list(_: argparse.Namespace) -> int:
    found = models.installed()
    if not found:
        print(f"No model is installed. Run `agentkit models pull {models.SMOLLM2.name}`.", file=sys.stderr)
    width = max((len(model.name) for model in found), default=0)
    for model in found:
        print(f"{model.name:<{width}}  {_size(model.size):>8}  {model.format:<11}  {model.path}")
    return 0


def _check(args: argparse.Namespace) -> int:
    report = models.check(args.name)
    print(f"{report.name} is intact: {report.path}")
    print(f"{report.parameters:,} parameters, {_size(report.size)} in {', '.join(report.kinds)}")
    print(f"context of {report.context:,} tokens")
    print("content verified by its SHA-256" if report.verified else "headers verified; no digest is pinned for it")
    return 0


def _size(size: int) -> str:
    """Bytes with a decimal unit."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
