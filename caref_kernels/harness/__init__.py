"""The paper's experiments.  Today: the four datasets in their official file formats, prompts, answers and samples.

Nothing here needs more than the standard library.
"""

from .data import COS_E_VERSIONS, DATASETS, Example, embedded_examples, load
from .formats import Answer, is_parsable, parse_answer, source_text, target_text
from .sampling import sample_shots

__all__ = [
    "COS_E_VERSIONS",
    "DATASETS",
    "Answer",
    "Example",
    "embedded_examples",
    "is_parsable",
    "load",
    "parse_answer",
    "sample_shots",
    "source_text",
    "target_text",
]
