"""Whole experiments on tiny models: rows, stops, faults, AdaLoRA and the terms."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

for name in ("filelock", "peft", "torchmetrics", "transformers", "typer"):
    pytest.importorskip(name)

import tiny_llama  # noqa: E402
import torch  # noqa: E402
from tiny_experiments import EXAMPLES, KINDS, Listener, lasting, run, save_model, tiny_settings  # noqa: E402

from caref_kernels.harness import DATASETS, runs, training  # noqa: E402
from caref_kernels.harness.results import Results  # noqa: E402
from caref_kernels.harness.summary import CURVE  # noqa: E402
from caref_kernels.harness.variants import VARIANTS  # noqa: E402
from caref_kernels.testing import check_identity  # noqa: E402

# transformers warns about an attribute that PEFT reads.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def same(one: float, other: float) -> None:
    """Equal up to the rounding of float32 sums in another order."""
    check_identity(torch.tensor(one), torch.tensor(other), "float32_terms")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_runs_every_kind_of_variant(kind: str, model, tmp_path: Path) -> None:
    variants = ("CAREF-AQ", "CE-LAQ", "CAREF-LORA-4", "ADALORA-32", "ZERO-STEP")
    summary, rows = run(tiny_settings(model[kind], variants=variants), tmp_path)
    assert (len(summary.finished), summary.failed) == (5, [])
    by_variant = {row["variant"]: row for row in rows.values()}
    assert by_variant["ZERO-STEP"]["curve"] == []
    for variant, row in by_variant.items():
        metrics = row["metrics"]
        assert metrics["nbert"] is None
        assert 0 <= metrics["ece"] <= 100
        assert 0 < metrics["label_nll"] < 10
        assert 1 <= metrics["k_t"] <= 300
        if variant == "ZERO-STEP":
            continue
        assert [record["step"] for record in row["curve"]] == [2, 4, 6, 8, 10]
        # AdaLoRA keeps the model's own loss; the others log every term.
        assert set(row["curve"][0]) == {"step", "loss", *(CURVE if variant != "ADALORA-32" else ())}
        assert metrics["label_nll"] != by_variant["ZERO-STEP"]["metrics"]["label_nll"], variant
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"answers", "failed", "locks", "results.jsonl", "settings.json"}
    assert not any((tmp_path / "failed").iterdir())
    answers = (tmp_path / "answers" / f"{row['run']}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == row["dev_size"] == 6


def test_every_dataset_runs_from_the_files_in_the_package(model, tmp_path: Path) -> None:
    settings = tiny_settings(model["llama"], datasets=tuple(DATASETS), train_size=6, max_steps=4)
    summary, rows = run(settings, tmp_path)
    assert (len(summary.finished), summary.failed) == (4, [])
    for row in rows.values():
        assert (row["train_size"], row["dev_size"], row["cut"] >= 0) == (6, 6, True)
        assert math.isfinite(row["metrics"]["nll"])


def test_the_logged_terms_are_the_objective(model, tmp_path: Path) -> None:
    """loss = ce + 0.1 sced + 0.1 kl, entropy = log V - kl, and k_t of a nearly uniform model is nearly V."""
    _, rows = run(tiny_settings(model["llama"], variants=("CAREF-AQ", "CE-AQ", "SCED-AQ", "KL-AQ")), tmp_path)
    for row in rows.values():
        weights = VARIANTS[row["variant"]].weights(0.1, 0.1)
        for record in row["curve"]:
            total = record["ce"] + weights["lambda_sced"] * record["sced"] + weights["lambda_kl"] * record["kl"]
            same(record["loss"], total)
            same(record["entropy"], math.log(len(tiny_llama.VOCABULARY)) - record["kl"])
            assert 200 < record["k_t"] <= len(tiny_llama.VOCABULARY)
    assert len({row["curve"][-1]["loss"] for row in rows.values()}) == 4


def test_a_second_run_finds_everything_and_is_the_same(model, tmp_path: Path) -> None:
    settings = tiny_settings(model["t5"], variants=("CAREF-AQ", "LORA-4"))
    _, first = run(settings, tmp_path / "a")
    callbacks = Listener()
    summary, again = run(settings, tmp_path / "a", callbacks)
    assert (len(summary.found), callbacks.steps, again) == (2, 0, first)
    _, other = run(settings, tmp_path / "b")
    assert {name: lasting(row) for name, row in other.items()} == {name: lasting(row) for name, row in first.items()}


def test_a_stopped_run_starts_again_and_is_the_undisturbed_one(model, tmp_path: Path) -> None:
    """T5 has dropout, so the random state counts; AdaLoRA has an allocator with a memory.  Finished rows stay."""
    settings = tiny_settings(model["t5"], variants=("CAREF-AQ", "ADALORA-32"), max_steps=6, adalora_target_r=2)
    _, whole = run(settings, tmp_path / "whole")
    # In the middle of the first run; after its training; in the middle of the second run; never.
    for stop, finished, steps in ((3, 0, 3), (6, 0, 6), (9, 1, 9), (None, 1, 6)):
        callbacks = Listener(stop)
        summary, rows = run(settings, tmp_path / "parts", callbacks)
        assert (summary.stopped, len(summary.finished), callbacks.steps) == (stop is not None, finished, steps)
    assert len(summary.found) == 1
    assert {name: lasting(row) for name, row in rows.items()} == {name: lasting(row) for name, row in whole.items()}


def test_a_stop_in_the_evaluation_leaves_no_row(model, tmp_path: Path) -> None:
    class Impatient(Listener):
        def job(self, job, steps: int) -> None:
            self.stop_after = 0

    summary, rows = run(tiny_settings(model["llama"], variants=("ZERO-STEP",)), tmp_path, Impatient())
    assert (summary.stopped, summary.finished, rows) == (True, [], {})


def test_adalora_prunes_its_ranks_and_keeps_its_regulariser(model, tmp_path: Path, monkeypatch) -> None:
    """The allocator's budget falls from 32 to 2 of each module, and PEFT's term is in the loss that is trained."""
    settings = tiny_settings(
        model["llama"], variants=("ADALORA-32",), adalora_target_r=2, adalora_orth_reg=0.5, max_steps=20
    )
    seen = {}
    real = runs.train

    def keep(adapted, *others):
        seen["model"] = adapted
        return real(adapted, *others)

    monkeypatch.setattr(runs, "train", keep)
    _, rows = run(settings, tmp_path)
    singular = {n: p for n, p in seen["model"].named_parameters() if "lora_E" in n}
    kept = sum(int((value != 0).sum()) for value in singular.values())
    assert kept <= 2 * len(singular)
    assert sum(map(sum, seen["model"].peft_config["default"].rank_pattern.values())) == 2 * len(singular)
    (row,) = rows.values()
    curve = row["curve"]
    # Cross-entropy of 261 bytes begins at log 261 = 5.56; half the mean norm of A A^T - I is well above it.
    assert curve[0]["loss"] > math.log(261) + 0.5


def test_a_nan_stops_the_run_with_a_dump(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = shutil.copytree(model["llama"], tmp_path / "model")
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    callbacks = Listener()
    summary, rows = run(tiny_settings(broken), tmp_path / "results", callbacks)
    assert (len(summary.failed), rows) == (1, {})
    failure = json.loads(next((tmp_path / "results" / "failed").iterdir()).read_text(encoding="utf-8"))
    dump = json.loads(failure["error"].strip().splitlines()[-1].partition("NonFiniteError: ")[2])
    assert dump["step"] == 1
    assert dump["parameters that are not finite"] == ["model.layers.1.mlp.down_proj.weight"]
    assert dump["logits"]["not finite"] > 0
    assert len(dump["examples"]) == 4
    # What failed is left alone by the next run, and tried again on request.
    callbacks = Listener()
    again, _ = run(tiny_settings(broken), tmp_path / "results", callbacks)
    assert (len(again.failed), callbacks.steps) == (1, 0)
    assert "failed before; resume tries it again" in callbacks.notes[0]
    retried, _ = run(tiny_settings(broken), tmp_path / "results", retry_failed=True)
    assert len(retried.failed) == 1


def _poison(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]) -> None:
    """Make the gradient of these steps NaN, behind the loss."""
    real = training.StepCallback.on_pre_optimizer_step

    def poisoned(self, args, state, control, **kwargs):
        if state.global_step in steps:
            next(p for p in self._trainer.model.parameters() if p.grad is not None).grad.fill_(math.nan)
        return real(self, args, state, control, **kwargs)

    monkeypatch.setattr(training.StepCallback, "on_pre_optimizer_step", poisoned)


@pytest.mark.parametrize(("allowed", "fails"), [(0, True), (1, True), (2, False)])
def test_bad_gradients_may_be_skipped(allowed, fails, model, tmp_path: Path, monkeypatch) -> None:
    _poison(monkeypatch, (3, 5))
    summary, rows = run(tiny_settings(model["llama"], skip_nonfinite=allowed), tmp_path)
    assert bool(summary.failed) is fails
    if not fails:
        assert math.isfinite(next(iter(rows.values()))["metrics"]["label_nll"])


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(model, tmp_path: Path, monkeypatch) -> None:
    settings = tiny_settings(model["llama"])
    _, whole = run(settings, tmp_path / "a")
    real = training.HarnessTrainer.training_step

    def small(self, model_, inputs, num_items_in_batch=None):
        if inputs["input_ids"].size(0) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, model_, inputs, num_items_in_batch)

    monkeypatch.setattr(training.HarnessTrainer, "training_step", small)
    callbacks = Listener()
    _, halved = run(settings, tmp_path / "b", callbacks)
    (name,) = whole
    assert [whole[name]["micro_batch"], halved[name]["micro_batch"]] == [4, 2]
    assert "micro-batch 2, the batch stays as it is" in callbacks.notes[0]
    assert callbacks.steps == 10
    for one, other in zip(whole[name]["curve"], halved[name]["curve"], strict=True):
        same(one["loss"], other["loss"])


def test_out_of_memory_in_evaluation_halves_its_batch(model, tmp_path: Path, monkeypatch) -> None:
    settings = tiny_settings(model["llama"], variants=("ZERO-STEP",))
    _, whole = run(settings, tmp_path / "a")
    real = runs.Evaluator.answers
    sizes = []

    def small(self, examples, new_tokens):
        sizes.append(self.batch_size)
        if self.batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, examples, new_tokens)

    monkeypatch.setattr(runs.Evaluator, "answers", small)
    _, halved = run(settings, tmp_path / "b")
    assert sizes == [16, 8, 4]
    (name,) = whole
    assert halved[name]["metrics"]["accuracy"] == whole[name]["metrics"]["accuracy"]


def test_a_lost_device_ends_the_process_and_marks_the_job(model, tmp_path: Path, monkeypatch) -> None:
    def lost(self, model_, inputs, num_items_in_batch=None):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(training.HarnessTrainer, "training_step", lost)
    with pytest.raises(runs.DeviceLostError, match="unspecified launch failure"):
        run(tiny_settings(model["llama"], variants=("CAREF-AQ", "CE-AQ")), tmp_path)
    failures = [path.name for path in (tmp_path / "failed").iterdir()]
    assert failures == ["comve.CAREF-AQ.s7004.a2.b1.json"]


def test_a_run_that_somebody_else_works_on_is_passed_over(model, tmp_path: Path) -> None:
    settings = tiny_settings(model["llama"], variants=("ZERO-STEP", "CAREF-AQ"))
    with Results(tmp_path).lock(settings.jobs()[0].name) as is_mine:
        assert is_mine
        summary, rows = run(settings, tmp_path)
    assert ([job.variant for job in summary.busy], len(rows)) == (["ZERO-STEP"], 1)


def test_other_settings_are_refused(model, tmp_path: Path) -> None:
    run(tiny_settings(model["llama"], variants=("ZERO-STEP",)), tmp_path)
    with pytest.raises(ValueError, match=r"begun with other settings \(learning_rate 0.01 -> 0.02\)"):
        run(tiny_settings(model["llama"], variants=("ZERO-STEP",), learning_rate=0.02), tmp_path)


def test_a_tokenizer_of_another_model_fails_before_the_first_step(model, tmp_path: Path) -> None:
    wrong = shutil.copytree(model["llama"], tmp_path / "model")
    config = json.loads((wrong / "config.json").read_text(encoding="utf-8"))
    (wrong / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}), encoding="utf-8")
    callbacks = Listener()
    summary, _ = run(tiny_settings(wrong), tmp_path / "results", callbacks)
    assert (len(summary.failed), callbacks.steps) == (1, 0)
    assert "eos_token_id: the model's configuration says 1, the tokenizer 2" in callbacks.notes[0]


def test_missing_things_are_named(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"model 'no/model' is not on this machine .*run: hf download no/model"):
        run(tiny_settings(Path("no/model")), tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="esnli: no such file"):
        run(tiny_settings(model["llama"], data=str(tmp_path / "empty"), datasets=("esnli",)), tmp_path / "b")
    with pytest.raises(FileNotFoundError, match="no such folder: "):
        run(tiny_settings(model["llama"], data=str(tmp_path / "none")), tmp_path / "c")


def test_a_bad_record_fails_its_jobs(model, tmp_path: Path) -> None:
    data = shutil.copytree(EXAMPLES, tmp_path / "data")
    path = data / "comve" / "Training_Data" / "subtaskA_answers_all.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[0] = lines[0].split(",")[0] + ",7"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    callbacks = Listener()
    summary, rows = run(
        tiny_settings(model["llama"], data=str(data), variants=("ZERO-STEP",)), tmp_path / "a", callbacks
    )
    assert (len(summary.failed), rows) == (1, {})
    assert "subtaskA_answers_all.csv:1: label: expected one of '0', '1'; got '7'" in callbacks.notes[0]


def test_changed_data_are_noticed(model, tmp_path: Path) -> None:
    data = shutil.copytree(EXAMPLES, tmp_path / "data")
    options = {"data": str(data), "splits": (0, 1)}
    run(tiny_settings(model["llama"], variants=("ZERO-STEP",), **options), tmp_path / "results")
    for path in (data / "comve").rglob("subtaskC_*answers*.csv"):
        path.write_text(path.read_text(encoding="utf-8").replace(".", "!"), encoding="utf-8")
    callbacks = Listener()
    summary, rows = run(tiny_settings(model["llama"], **options), tmp_path / "results", callbacks)
    assert (len(summary.failed), len(rows)) == (1, 1)
    assert "comve: other examples than in the finished runs; the data files have changed" in callbacks.notes[0]


def test_bf16_trains_and_evaluates(model, tmp_path: Path) -> None:
    _, rows = run(tiny_settings(model["llama"], precision="bf16"), tmp_path)
    (row,) = rows.values()
    assert row["curve"][-1]["loss"] != row["curve"][0]["loss"]
    assert math.isfinite(row["metrics"]["label_nll"])


def test_rows_carry_their_origin_and_no_secret(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAREF_TEST_SECRET", "hunter2")
    _, rows = run(tiny_settings(model["llama"], variants=("ZERO-STEP",)), tmp_path)
    (row,) = rows.values()
    assert {"model", "revision", "protocol", "split", "settings", "scorer", "device", "backend", "versions"} <= set(row)
    assert row["versions"]["torch"] == torch.__version__
    assert row["protocol"] == "changed sizes"
    text = (tmp_path / "results.jsonl").read_text(encoding="utf-8")
    assert "hunter2" not in text
    assert str(tmp_path) not in text
