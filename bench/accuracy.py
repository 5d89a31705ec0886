"""What quantised weights and KV cost in accuracy, on SmolLM2-135M and real text, beside transformers and gguf.

    python bench/accuracy.py [--quick] [--json FILE]

The texts are documentation and source code of Python's standard library. The baseline is the embedded model widened to
fp32; transformers' logits of the same file say whether that is right. All other rows are compared with it position by
position: the Kullback-Leibler divergence of the next token's distribution, and whether the most likely token is the
same.

The file's weights are of 4 bits themselves. Quantised again in the same groups of 32 they would lose nothing, so the
model's channels are shuffled first, alike in all matrices: that changes no result, but which weights share a group.

Forms that have products on a GPU only are quantised and widened again. The others run as they do in decoding, in steps
of few rows; "read" are the bytes of weights that a step reads.
"""

from __future__ import annotations

import argparse
import decimal
import difflib
import heapq
import inspect
import json
import math
import platform
import textwrap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf.quants
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from agentkit.kernels.attention import Work
from agentkit.kernels.quant import dequantize, quantize_fp8, quantize_int4, quantize_int8
from agentkit.models import resolve
from agentkit.runtime.model import Batch, Model
from agentkit.runtime.vocab import Vocabulary
from agentkit.runtime.weights import Blocks, Checkpoint, open_checkpoint

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
#: Rows of a step: so few that the products are those of decoding (`agentkit.kernels.compact`).
ROWS = 16


def texts() -> list[str]:
    """Prose and code that come with every Python."""
    prose = [inspect.getdoc(module) or "" for module in (decimal, difflib)]
    return [
        "\n\n".join([heapq.__about__, *prose]),
        inspect.getsource(difflib.SequenceMatcher),
        inspect.getsource(textwrap),
        inspect.getsource(argparse.HelpFormatter),
    ]


class Changed:
    """A `Checkpoint` with other values.

    Args:
        source: where they come from.
        change: gives a tensor of a name from the one that the source has, in fp32.
    """

    def __init__(self, source: Checkpoint, change: Callable[[str, Tensor], Tensor]) -> None:
        self._source, self._change = source, change
        self.config, self.digest = source.config, "changed"

    def vocabulary(self) -> Vocabulary:
        return self._source.vocabulary()

    def names(self) -> Collection[str]:
        return self._source.names()

    def tensor(self, name: str) -> Tensor:
        tensor = self._source.tensor(name)
        wide = tensor.dense(torch.float32) if isinstance(tensor, Blocks) else tensor.float()
        return self._change(name, wide)


def shuffled(source: Checkpoint) -> Changed:
    """The same model with its channels in another order: those between layers, within a head, and within an MLP."""
    c, generator = source.config, torch.Generator().manual_seed(0)
    stream = torch.randperm(c.hidden, generator=generator)
    inner = torch.randperm(c.intermediate, generator=generator)
    head = torch.randperm(c.head_dim, generator=generator)
    # Values keep to their heads; what queries and keys share with the rotation stays where it is.
    values = (torch.arange(c.kv_heads).unsqueeze(1) * c.head_dim + head).flatten()
    outputs = (torch.arange(c.heads).unsqueeze(1) * c.head_dim + head).flatten()

    def change(name: str, x: Tensor) -> Tensor:
        kind = name.split(".")[-2]
        if kind in ("gate_proj", "up_proj"):
            return x[inner][:, stream]
        if kind == "down_proj":
            return x[stream][:, inner]
        if kind == "o_proj":
            return x[stream][:, outputs]
        if kind == "v_proj":
            return x[values][:, stream]
        return x[..., stream]  # rows of the embedding, weights of norms, and what else reads the stream

    return Changed(source, change)


def rounded(source: Checkpoint, form: Callable[[Tensor], Tensor]) -> Changed:
    """The matrices of the layers through a form and back."""
    return Changed(source, lambda name, x: form(x) if name.endswith("_proj.weight") else x)


def through_gguf(kind: GGMLQuantizationType) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))


@dataclass(frozen=True, slots=True)
class Form:
    """One row of the table.

    Attributes:
        name: in the table.
        make: the model, from the shuffled checkpoint.
        kv: dtype of the KV, the model's by default.
        runs: whether this form runs here, rather than being widened.
    """

    name: str
    make: Callable[[Checkpoint], Model]
    kv: torch.dtype | None = None
    runs: bool = True


def exact(source: Checkpoint) -> Model:
    return Model(source, CPU, torch.float32, packed=False)


FORMS = (
    Form("bfloat16", lambda x: Model(x, CPU, torch.bfloat16, packed=False)),
    Form("float16 weights", lambda x: Model(x, CPU, torch.float32, packed=True)),
    Form("int8", lambda x: Model(x, CPU, torch.float32, packed=True, weights="int8")),
    Form("int8 of a GPU", lambda x: exact(rounded(x, lambda w: dequantize(quantize_int8(w), w.dtype))), runs=False),
    Form("fp8 of a GPU", lambda x: exact(rounded(x, lambda w: dequantize(quantize_fp8(w), w.dtype))), runs=False),
    Form("only int4", lambda x: exact(rounded(x, lambda w: dequantize(quantize_int4(w), w.dtype))), runs=False),
    Form("int4", lambda x: Model(x, CPU, torch.float32, packed=True, weights="int4")),
    Form("gguf's Q8_0", lambda x: exact(rounded(x, through_gguf(GGMLQuantizationType.Q8_0))), runs=False),
    Form("gguf's Q4_1", lambda x: exact(rounded(x, through_gguf(GGMLQuantizationType.Q4_1))), runs=False),
    Form("fp8 KV", exact, FP8),
    Form("int4, fp8 KV", lambda x: Model(x, CPU, torch.float32, packed=True, weights="int4"), FP8),
)


#: The forms of ``--quick``: those of the last line.
QUICK = ("int8", "only int4", "int4", "gguf's Q4_1", "fp8 KV")


@dataclass(slots=True)
class Loss:
    """Sums over positions of what a form loses."""

    positions: int = 0
    logprob: float = 0.0
    divergence: float = 0.0
    same: int = 0
    worst: float = field(default=0.0)

    def add(self, ids: Tensor, logprobs: Tensor, baseline: Tensor) -> None:
        """One window: ids ``[t]``, log-probabilities after each of them but the last, ``[t - 1, vocab]``."""
        self.positions += len(ids) - 1
        self.logprob += float(logprobs.gather(1, ids[1:, None]).double().sum())
        divergence = (baseline.exp() * (baseline - logprobs)).double().sum(1)
        self.divergence += float(divergence.sum())
        self.worst = max(self.worst, float(divergence.max()))
        self.same += int((logprobs.argmax(1) == baseline.argmax(1)).sum())

    def row(self) -> dict[str, float]:
        return {
            "perplexity": math.exp(-self.logprob / self.positions),
            "divergence": self.divergence / self.positions,
            "worst divergence": self.worst,
            "same token": self.same / self.positions,
        }


def logprobs(model: Model, ids: Tensor, kv: torch.dtype | None, rows: int, tokens: int) -> Tensor:
    """``[t - 1, tokens]`` in fp32, the window computed ``rows`` at a time over a KV pool of its own."""
    pool = torch.zeros((model.config.layers, len(ids), *model.kv_shape), dtype=kv or model.dtype)
    found: list[Tensor] = []
    for start in range(0, len(ids) - 1, rows):
        stop = min(start + rows, len(ids) - 1)
        at = torch.arange(start, stop)
        work = [Work(0, stop - start, ((0, stop),))]
        batch = Batch(ids[start:stop], at, at, work, at - start)
        found.append(model.forward(batch, pool)[:, :tokens].log_softmax(-1))
    return torch.cat(found)


def peer_logprobs(path: Path, windows: list[Tensor], tokens: int) -> Iterator[Tensor]:
    """Transformers' on the file as it is."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    for ids in windows:
        yield model(ids.unsqueeze(0)).logits[0, :-1, :tokens].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the text, fewer forms")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    path = resolve("smollm2-135m")
    file = open_checkpoint(path)
    source, vocab = shuffled(file), file.vocabulary()
    length = 128 if args.quick else 512
    windows = [torch.tensor(vocab.encode(text)[:length]) for text in texts()]
    model = exact(source)
    baselines = [logprobs(model, ids, None, length, vocab.size) for ids in windows]
    print(
        f"{path.name} · torch {torch.__version__} · Python {platform.python_version()} · "
        f"{sum(map(len, windows)):,} tokens in {len(windows)} texts\n"
    )
    print(f"{'':<18}{'perplexity':>11}{'lost':>9}{'divergence':>12}{'worst':>9}{'same token':>12}{'read':>10}")
    figures: dict[str, dict[str, float]] = {}

    def report(name: str, found: Iterator[Tensor], read: int | None) -> None:
        loss = Loss()
        for ids, rows, baseline in zip(windows, found, baselines, strict=True):
            loss.add(ids, rows, baseline)
        row = figures[name] = loss.row()
        row["lost"] = row["perplexity"] / figures["baseline"]["perplexity"] - 1
        print(
            f"{name:<18}{row['perplexity']:>11.3f}{row['lost']:>9.2%}{row['divergence']:>12.6f}"
            f"{row['worst divergence']:>9.4f}{row['same token']:>12.1%}"
            + (f"{read / 1e6:>7.0f} MB" if read is not None else f"{'–':>10}"),
            flush=True,
        )

    report("baseline", iter(baselines), model.weight_bytes)
    report("transformers", peer_logprobs(path, windows, vocab.size), None)
    for form in FORMS:
        if args.quick and form.name not in QUICK:
            continue
        model = form.make(source)
        rows = ROWS if form.runs else length
        found = (logprobs(model, ids, form.kv, rows, vocab.size) for ids in windows)
        report(form.name, found, model.weight_bytes if form.runs else None)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    lost = {name: f"{row['lost']:.2%}" for name, row in figures.items()}
    further = figures["only int4"]["divergence"] / figures["gguf's Q4_1"]["divergence"]
    print(
        f"\nbaseline is transformers' within a divergence of {abs(figures['transformers']['divergence']):.0e} (target "
        f"1e-6) · perplexity lost: int8 {lost['int8']} (target 1), int4 {lost['int4']} (target 5), fp8 KV "
        f"{lost['fp8 KV']} (target 1) · int4 alone diverges {further:.2f} times as far as gguf's Q4_1 (target 1)"
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
