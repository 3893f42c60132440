"""The figures that the paper reports (arXiv 2605.27835, main table): to stand beside measured ones, never instead.

Averages over 60 splits of Flan-T5-large; per dataset in the order of ``DATASETS``.  Of LoRA r=4 only these are known.
Of the standard deviations only CAREF-AQ's on COS-E is: 1.54 accuracy, 1.37 nBERT.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple

from .data import DATASETS

SPLITS = 60
MODEL = "google/flan-t5-large"


class PaperRow(NamedTuple):
    """One row: percent of parameters, then accuracy and nBERT per dataset and on average."""

    percent: float
    accuracy: tuple[float, ...]
    accuracy_mean: float
    nbert: tuple[float, ...]
    nbert_mean: float

    def value(self, metric: str, dataset: str | None) -> float | None:
        """The figure of a dataset, or the average for ``None``; ``None`` where the paper has none."""
        if metric not in ("accuracy", "nbert"):
            return None
        if dataset is None:
            return getattr(self, f"{metric}_mean")
        values = dict(zip(DATASETS, getattr(self, metric), strict=False))
        return values.get(dataset)


TABLE = MappingProxyType(
    {
        "CAREF-BASE": PaperRow(100.0, (85.19, 86.29, 94.76, 88.32), 88.64, (74.00, 77.51, 86.60, 79.76), 79.47),
        "CAREF-DEC": PaperRow(52.23, (81.56, 85.76, 94.73, 74.73), 84.19, (71.53, 77.40, 87.54, 67.89), 76.09),
        "CAREF-AQKV": PaperRow(19.28, (84.30, 88.51, 94.37, 88.26), 88.86, (73.43, 79.29, 86.73, 81.80), 80.31),
        "CAREF-LAQ": PaperRow(6.44, (84.73, 88.93, 94.23, 88.07), 88.99, (74.57, 79.96, 86.57, 80.96), 80.52),
        "CAREF-AQ": PaperRow(6.43, (84.59, 88.93, 94.16, 88.48), 89.04, (74.42, 80.31, 87.29, 81.97), 81.00),
        "AdaLoRA": PaperRow(4.46, (43.32, 15.16, 35.32, 0.56), 23.59, (35.48, 12.33, 30.74, 0.47), 19.75),
        "LoRA r=128": PaperRow(15.74, (84.58, 91.77, 94.57, 83.37), 88.57, (74.52, 82.89, 87.73, 77.17), 80.58),
        "LoRA r=4": PaperRow(0.58, (), 88.92, (), 80.91),
    }
)
