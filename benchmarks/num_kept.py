"""`python -m benchmarks.num_kept FILE`: how many columns a top-k mask keeps on real logits, and what share of SCED.

FILE is a safetensors file with ``logits`` (N, V).  Writes results/num_kept.json; ``make bench-report`` draws it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, median_high

import torch
from torch import Tensor

from caref_kernels import CarefOutput, EntropyTopK, TopK, caref_loss

from .results_file import FOLDER
from .tables import Page, cells, table_head

FILE = FOLDER / "num_kept.json"
SCALES = (1.0, 0.25, 0.1)
POLICIES: dict[str, EntropyTopK | TopK] = {
    **{f"EntropyTopK({scale:g})": EntropyTopK(scale=scale) for scale in SCALES},
    **{f"TopK({k})": TopK(k) for k in (1, 4, 64)},
}
FIELDS = ("num_kept", "sced_share", "probability")


def observe(logits: Tensor) -> list[dict]:
    """For every row its entropy, and for every policy k and the shares of SCED and of the probability in the mask."""
    exact = logits.double()
    dense = _terms(exact, None)
    cumulated = exact.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    rows = [{"entropy": one} for one in dense.entropy.tolist()]
    for name, policy in POLICIES.items():
        out = _terms(exact, policy)
        kept = cumulated.gather(-1, out.num_kept.long()[:, None] - 1).squeeze(-1)
        found = zip(out.num_kept.tolist(), (out.sced / dense.sced).tolist(), kept.tolist(), strict=True)
        for row, (k, *shares) in zip(rows, found, strict=True):
            row[name] = [int(k), *shares]
    return rows


def _terms(logits: Tensor, policy: EntropyTopK | TopK | None) -> CarefOutput:
    labels = torch.zeros(len(logits), dtype=torch.long)
    return caref_loss(logits, labels, sparsity=policy, reduction="none", return_terms=True, backend="reference")


def block(found: dict | None, page: Page) -> str:
    """What each policy keeps, over the rows, and the plot."""
    if found is None:
        return "Not yet measured: `python -m benchmarks.num_kept FILE` fills this in."
    lines = table_head(["policy", "median k", "SCED kept, mean", "SCED kept, least", "probability kept, mean"])
    for name in found["policies"]:
        kept, shares, probability = zip(*(row[name] for row in found["rows"]), strict=True)
        figures = [f"{100 * fmean(shares):.2f} %", f"{100 * min(shares):.1f} %", f"{100 * fmean(probability):.0f} %"]
        lines.append(cells([name, str(median_high(kept)), *figures]))
    size = f"{len(found['rows'])} rows of {found['source']}, V = {found['columns']:,}"
    plot = page.image(f"k against the entropy of {size}", "num_kept.png")
    text = f"The reference backend in float64 on {size}. Data: {page.link('num_kept.json')}."
    return "\n\n".join(["\n".join(lines), plot, text])


def text_of(source: str, columns: int, rows: list[dict]) -> str:
    """The file's content: one line for each row of logits."""
    head = {"source": source, "columns": columns, "policies": list(POLICIES), "fields": list(FIELDS)}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    records = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return "{\n" + ",\n".join([*lines, f' "rows": [\n{records}\n ]']) + "\n}\n"


def main(arguments: list[str] | None = None) -> None:
    """Read the logits and write the results."""
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(prog="python -m benchmarks.num_kept", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="safetensors with a tensor `logits`")
    parser.add_argument("--source", default="SmolLM2-135M", help="the model that the rows come from")
    parser.add_argument("--output", type=Path, default=FILE, help="the results")
    options = parser.parse_args(arguments)
    logits = load_file(options.file)["logits"]
    options.output.write_text(text_of(options.source, logits.size(-1), observe(logits)))


if __name__ == "__main__":
    main()
