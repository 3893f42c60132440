"""Which parameters every variant trains: the paper's nine percentages, and the same names on other models."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for name in ("transformers", "typer"):
    pytest.importorskip(name)

import transformers  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from caref_kernels.harness import paper  # noqa: E402
from caref_kernels.harness.__main__ import app  # noqa: E402
from caref_kernels.harness.parameters import FLAN_T5_LARGE, KNOWN_CONFIGS, count, meta_model, model_config  # noqa: E402
from caref_kernels.harness.variants import VARIANTS, family, prepare, selected_names, trainable_parameters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FLAN = KNOWN_CONFIGS[FLAN_T5_LARGE]


@pytest.fixture(scope="module")
def flan():
    return meta_model(FLAN)


# Trained parameters, all of them, and the number of tensors: counted once from the published checkpoint's names.
SPARSE = {
    "CAREF-BASE": (783_150_080, 558),
    "CAREF-DEC": (409_019_904, 338),
    "CAREF-AQKV": (150_994_944, 144),
    "CAREF-AQ": (50_331_648, 48),
    "CAREF-LAQ": (50_456_576, 170),
}
ADAPTERS = {
    "LORA-4": (4_571_136, 787_721_216),
    "LORA-128": (146_276_352, 929_426_432),
    "ADALORA-32": (36_583_344, 819_733_424),
}


@pytest.mark.parametrize("name", SPARSE)
def test_flan_t5_large_counts(flan, name: str) -> None:
    trained, tensors = SPARSE[name]
    assert len(selected_names(flan, VARIANTS[name])) == tensors
    assert trainable_parameters(prepare(flan, VARIANTS[name], 600)) == (trained, 783_150_080)
    assert round(100 * trained / 783_150_080, 2) == paper.TABLE[name].percent


def test_params_prints_the_counts_and_the_papers_percentages() -> None:
    """The command's default model is the paper's, and its nine percentages are printed to two decimals."""
    done = CliRunner().invoke(app, ["params"])
    assert done.exit_code == 0, done.output
    cells = (line.strip("│").split("│") for line in done.stdout.splitlines() if line.startswith("│"))
    printed = {name.strip(): [text.strip() for text in numbers] for name, *numbers in cells}
    assert set(printed) == set(VARIANTS)
    for name, (trained, total) in (ADAPTERS | {key: (one, 783_150_080) for key, (one, _) in SPARSE.items()}).items():
        reported = paper.TABLE[VARIANTS[name].paper].percent
        assert printed[name] == [f"{trained:,}", f"{total:,}", f"{100 * trained / total:.4f}", f"{reported:.2f}"]
        assert round(100 * trained / total, 2) == reported


def test_every_row_of_the_paper_is_a_variant() -> None:
    assert {row.paper for row in VARIANTS.values() if row.paper} == set(paper.TABLE)
    for name, row in paper.TABLE.items():
        for metric in ("accuracy", "nbert"):
            cells = getattr(row, metric)
            # The printed averages are the means of the printed cells, to the last printed digit.
            assert not cells or abs(sum(cells) / 4 - row.value(metric, None)) < 0.00501, name


@pytest.mark.parametrize("name", ["AQ", "AQKV", "LAQ"])
def test_both_readings_of_the_attention_scope_count_alike(flan, name: str) -> None:
    one, other = (set(selected_names(flan, VARIANTS[f"CAREF-{name}{end}"])) for end in ("", "-SELF"))
    sizes = {key: value.numel() for key, value in flan.named_parameters()}
    assert sum(map(sizes.get, one)) == sum(map(sizes.get, other))
    assert one - other
    assert all("EncDecAttention" in key for key in one - other)
    assert all(key.startswith("encoder.") for key in other - one)


def test_objectives_are_the_terms() -> None:
    weights = {name: tuple(VARIANTS[name].weights(0.3, 0.2).values()) for name in VARIANTS if name.endswith("-AQ")}
    assert weights == {"CAREF-AQ": (0.3, 0.2), "CE-AQ": (0.0, 0.0), "SCED-AQ": (0.3, 0.0), "KL-AQ": (0.0, 0.2)}
    assert {"CE-BASE", "CE-DEC", "CE-AQKV", "CE-LAQ", "CE-AQ"} <= set(VARIANTS)


# pilot.md counts SmolLM2 in its checkpoint; here from its configuration.
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("name", "trained", "percent"),
    [
        ("CAREF-BASE", 134_515_008, 100),
        ("CAREF-DEC", 106_203_456, 78.95),
        ("CAREF-AQKV", 16_588_800, 12.33),
        ("CAREF-LAQ", 9_988_416, 7.43),
        ("CAREF-AQ", 9_953_280, 7.40),
        ("CAREF-AQ-SELF", 9_953_280, 7.40),
        ("LORA-4", 1_221_120, 0.90),
        ("ZERO-STEP", 0, 0),
    ],
)
def test_smollm2_counts(name: str, trained: int, percent: float) -> None:
    counted = count(SMOLLM2, VARIANTS[name])
    assert (counted.trained, round(counted.percent, 2)) == (trained, percent)


def test_bart_counts() -> None:
    config = {"model_type": "bart", "vocab_size": 101, "d_model": 8, "encoder_layers": 1, "decoder_layers": 2}
    config |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    config |= {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
    model = meta_model(config)
    names = {name: selected_names(model, VARIANTS[f"CAREF-{name}"]) for name in ("DEC", "AQKV", "LAQ", "AQ")}
    assert len(names["AQ"]) == 2 * 2
    assert len(names["AQKV"]) == 3 * 2 * 2
    # One layer norm behind each of 2 encoder and 3 decoder sublayers, and one behind each embedding; weight and bias.
    assert len(names["LAQ"]) == len(names["AQ"]) + 2 * (2 + 2 * 3 + 2)
    assert all(name.startswith("model.decoder.") and "embed_tokens" not in name for name in names["DEC"])
    assert len(selected_names(model, VARIANTS["CAREF-AQ-SELF"])) == 1 + 2


def test_a_fused_projection_is_refused() -> None:
    config = {"model_type": "gpt2", "vocab_size": 11, "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 8}
    config |= {"bos_token_id": 0, "eos_token_id": 0}
    with pytest.raises(ValueError, match=r"variant CAREF-AQ: no parameter of this gpt2 model matches .*it has \d+"):
        prepare(meta_model(config), VARIANTS["CAREF-AQ"], 10)
    with pytest.raises(ValueError, match=r"model_type must be one of t5, .* or decoder-only; got 'marian'"):
        family(SimpleNamespace(model_type="marian", is_encoder_decoder=True))


def test_adapters_leave_the_head_alone() -> None:
    model = prepare(meta_model(FLAN | {"num_layers": 1, "num_decoder_layers": 1}), VARIANTS["LORA-4"], 10)
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained
    assert all("lora_" in name and "lm_head" not in name for name in trained)


def test_a_config_file_decides_tying(tmp_path: Path) -> None:
    small = FLAN | {"num_layers": 1, "num_decoder_layers": 1, "d_model": 8, "d_ff": 8, "vocab_size": 32}
    for tied, heads in ((True, 1), (False, 2)):
        (tmp_path / "config.json").write_text(json.dumps(small | {"tie_word_embeddings": tied}), encoding="utf-8")
        names = dict(meta_model(model_config(str(tmp_path))).named_parameters())
        assert sum(value.shape == torch.Size([32, 8]) for value in names.values()) == heads
    with pytest.raises(FileNotFoundError, match=r"must be a folder with a config\.json or one of google/flan-t5-large"):
        model_config(str(tmp_path / "none"))


def test_freezing_is_complete() -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        )
    )
    prepare(model, VARIANTS["CAREF-AQ"], 10)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    prepare(model, VARIANTS["ZERO-STEP"], 10)
    assert trainable_parameters(model)[0] == 0
