"""The paper's experiments: data, FEB's protocol, variants, runs that survive being killed, and honest reports.

    python -m caref_kernels.harness --help

What is exported here needs the standard library only; everything else is imported by the commands that use it.
"""

from .data import COS_E_VERSIONS, DATASETS, Example, embedded_examples, load
from .encoding import Encoder, check_tokens
from .formats import is_parsable, parse_answer, source_text, target_text

__all__ = [
    "COS_E_VERSIONS",
    "DATASETS",
    "Encoder",
    "Example",
    "check_tokens",
    "embedded_examples",
    "is_parsable",
    "load",
    "parse_answer",
    "source_text",
    "target_text",
]
