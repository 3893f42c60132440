"""The paper's experiments: data, FEB's protocol, variants, runs that survive being killed, and honest reports.

    python -m caref_kernels.harness --help

What is exported here needs the standard library only; everything else is imported by the commands that use it.
"""

from .data import COS_E_VERSIONS, DATASETS, Example, embedded_examples, load
from .encoding import BECAUSE, EXPLANATION, LABEL, Encoded, Encoder, check_tokens
from .formats import Answer, is_parsable, parse_answer, source_text, target_text
from .sampling import sample_shots

__all__ = [
    "BECAUSE",
    "COS_E_VERSIONS",
    "DATASETS",
    "EXPLANATION",
    "LABEL",
    "Answer",
    "Encoded",
    "Encoder",
    "Example",
    "check_tokens",
    "embedded_examples",
    "is_parsable",
    "load",
    "parse_answer",
    "sample_shots",
    "source_text",
    "target_text",
]
