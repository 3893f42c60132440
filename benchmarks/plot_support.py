"""`python -m benchmarks.plot_support FILE`: k_t against entropy on real logits, and what a mask keeps of SCED.

FILE is a safetensors file with ``logits`` (N, V).  Writes results/support.json and results/support.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from caref_kernels import CarefOutput, EntropyTopK, TopK, caref_loss

from .provenance import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "support.json"
SCALES = (1.0, 0.25, 0.1)
POLICIES: dict[str, EntropyTopK | TopK] = {
    **{f"EntropyTopK({scale:g})": EntropyTopK(scale=scale) for scale in SCALES},
    **{f"TopK({k})": TopK(k) for k in (1, 4, 64)},
}


def observe(logits: Tensor) -> dict:
    """Entropy of every row, and for every policy k and the shares of SCED and of the probability inside the mask."""
    exact = logits.double()
    dense = _terms(exact, None)
    found: dict = {"columns": logits.size(-1), "entropy": dense.entropy.tolist(), "policies": {}}
    ordered = exact.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    for name, policy in POLICIES.items():
        out = _terms(exact, policy)
        kept = ordered.gather(-1, out.num_kept.long()[:, None] - 1).squeeze(-1)
        found["policies"][name] = {
            "support": [int(k) for k in out.num_kept],
            "sced_share": (out.sced / dense.sced).tolist(),
            "probability": kept.tolist(),
        }
    return found


def _terms(logits: Tensor, policy: EntropyTopK | TopK | None) -> CarefOutput:
    labels = torch.zeros(len(logits), dtype=torch.long)
    return caref_loss(logits, labels, sparsity=policy, reduction="none", return_terms=True, backend="reference")


def summary(found: dict) -> list[str]:
    """Markdown lines: what each policy keeps, over the rows."""
    lines = [
        "| policy | median k | SCED kept, mean | least | probability kept, mean |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in found["policies"].items():
        support = sorted(values["support"])[len(values["support"]) // 2]
        shares, kept = values["sced_share"], values["probability"]
        lines.append(
            f"| {name} | {support} | {100 * sum(shares) / len(shares):.2f} % | {100 * min(shares):.1f} % | "
            f"{100 * sum(kept) / len(kept):.0f} % |"
        )
    return lines


def draw(found: dict, path: Path) -> None:
    """k against entropy for every scale; reproducible byte by byte."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "caref", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.4), layout="constrained")
    for scale in SCALES:
        support = found["policies"][f"EntropyTopK({scale:g})"]["support"]
        axes.plot(found["entropy"], support, ".", label=f"scale = {scale:g}")
    axes.set_yscale("log")
    axes.set_xlabel("entropy of the row, nats")
    axes.set_ylabel("k, tokens in the mask")
    axes.set_title(f"{len(found['entropy'])} rows of a language model, V = {found['columns']:,}")
    axes.legend()
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Read the logits, write the results and the plot, print the table."""
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_support")
    parser.add_argument("file", type=Path, help="safetensors with a tensor `logits`")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the results; the plot goes beside it")
    options = parser.parse_args(arguments)
    found = observe(load_file(options.file)["logits"])
    options.output.write_text(json.dumps(found) + "\n")
    draw(found, options.output.with_suffix(".svg"))
    sys.stdout.write("\n".join(summary(found)) + "\n")


if __name__ == "__main__":
    main()
