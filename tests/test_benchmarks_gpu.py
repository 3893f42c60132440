"""The suites, tried on the CPU: every suite ends in a results file; other libraries are called as documented."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types

import cuda_device
import pytest
import torch
from torch.nn import functional

from benchmarks import cases, measure, peers, step, tables
from benchmarks.implementations import GPU_LOSSES, PEERS, Implementation
from benchmarks.results_file import load
from benchmarks.sources import ROOT
from benchmarks.workspaces import LossWorkspace
from caref_kernels import backends

TINY_HEAD = cases.HeadCase("tiny", 24, 300, 16)


@pytest.fixture
def run_suite(monkeypatch, tmp_path):
    """Runs a suite with its workers in this process, and returns its results."""

    def run(module, arguments, _limits, _environment):
        part = tmp_path / "part.json"
        sys.modules[module].main([*arguments, "--part", str(part)])
        return json.loads(part.read_text()), None

    def run_suite(suite, *arguments, **changes):
        monkeypatch.setattr(measure, "run", run)
        monkeypatch.setitem(measure.SUITES, suite, measure.SUITES[suite]._replace(**changes))
        output = tmp_path / "results.json"
        measure.main([suite, "--device", "cpu", "--seconds", "0", "--output", str(output), *arguments])
        return load(output)

    return run_suite


def _without_compiled(suite):
    return tuple(one for one in measure.SUITES[suite].implementations if "compiled" not in one.name)


def test_the_gpu_suite_on_the_cpu(run_suite, capsys):
    """Everything but the device: which implementations are absent and why, records, the file."""
    kept = _without_compiled("gpu")
    results = run_suite("gpu", "--rows", "2", "--cases", "flan-t5", implementations=kept)
    rows = results.of("flan-t5")
    assert rows.keys() == {"copy", "cross-entropy", "eager", "eager-topk"}
    own = {f"triton{kind}" for kind in ("", "-inplace", "-ce", "-ce-inplace", "-topk")}
    assert own | {one.name for one in PEERS} <= set(results.absent["flan-t5"])
    assert rows.keys() | results.absent["flan-t5"].keys() == {one.name for one in kept}
    assert rows["eager"].keys() >= {"errors", "samples", "forward_ms", "backward_ms", "both_ms"}
    assert "forward_ms" not in rows["copy"]
    assert results.provenance["peers"].keys() == set(peers.DISTRIBUTIONS.values())
    title = results.cases["flan-t5"]
    assert tables.gigabytes_per_second(title, {"implementation": "x", "both_ms": [0, 2.0, 0]}) == pytest.approx(
        3 * 2 * 32_128 * 2 / 2.0 / 1e6
    )
    assert "eager" in capsys.readouterr().out


@pytest.mark.parametrize("suite", ["heads-gpu", "linear"])
def test_suites_of_heads(suite, run_suite):
    tiny = (TINY_HEAD, dataclasses.replace(TINY_HEAD, name="f", frozen=True))
    results = run_suite(suite, cases=tiny, parts=("time",))
    known = {one.name for one in measure.SUITES[suite].implementations}
    for case in ("tiny", "f"):
        rows = results.of(case)
        assert {"eager", "logits", "fused", "fused-ce", "cross-entropy"} <= rows.keys()
        assert rows.keys() | results.absent[case].keys() >= known
        gradients = {"gradient of hidden"} | ({"gradient of weight"} if case == "tiny" else set())
        assert set(rows["fused"]["errors"]) == {"loss"} | gradients
    if suite == "linear":
        assert results.absent["f"]["TRL add_fused_lm_head"].startswith("measured on a GPU or not at all")


def test_a_head_that_is_wrong_is_not_timed(run_suite):
    def wrong(hidden, weight, labels):
        return 1.1 * functional.cross_entropy(hidden @ weight.t(), labels)

    chosen = (measure.SUITES["heads-gpu"].implementations[0], Implementation("wrong", "", wrong, "ce"))
    results = run_suite("heads-gpu", cases=(TINY_HEAD,), implementations=chosen)
    assert results.absent["tiny"]["wrong"].startswith("does not pass verification: tiny, wrong")
    assert results.of("tiny").keys() == {"eager"}


def test_the_suites_of_the_cpu_measure_both_allocators_and_memory(run_suite):
    chosen = _without_compiled("loss")[:3]
    results = run_suite("loss", "--rows", "2", "--cases", "flan-t5", implementations=chosen)
    if any("PermissionError" in reason for reason in results.left_out.values()):
        pytest.skip("this kernel does not let a process reset the peak of its resident set")
    assert results.left_out == {}
    for name, row in results.of("flan-t5").items():
        assert row["default_allocator"].keys() == {
            "samples", "page_faults", "both_ms", *(() if name == "copy" else ("forward_ms", "backward_ms")),
        }  # fmt: skip
        assert row["extra_bytes"] >= 0
    sparse = run_suite("sparse", "--rows", "2", "--cases", "flan-t5")
    assert sparse.of("flan-t5")["fused 64"]["mean_num_kept"] == 64
    assert 1 < sparse.of("flan-t5")["eager exp(H)"]["mean_num_kept"] < 32_128


@pytest.mark.parametrize("suite", ["gpu", "heads-gpu", "step-gpu"])
def test_without_a_gpu_nothing_is_measured(suite):
    if cuda_device.missing() is None:
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit, match="no CUDA device; nothing was measured"):
        measure.main([suite])


def test_the_command_says_what_it_takes():
    command = [sys.executable, "-m", "benchmarks.measure", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "--time-limit" in text
    assert "--worker" not in text
    assert all(name in text for name in measure.SUITES)
    with pytest.raises(SystemExit, match="cases must be among flan-t5"):
        measure.main(["loss", "--cases", "gpt-9"])


def test_backends_of_gpus_are_found_by_name():
    expected = [name for name in backends.ORDER if name not in ("cpu", "reference")]
    assert list(dict.fromkeys(one.backend for one in GPU_LOSSES if one.backend)) == expected


# ---------------------------------------------------------------------------------------------------- other libraries


def test_a_peer_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    assert peers.missing("quack").startswith("quack-kernels cannot be imported: ModuleNotFoundError: ")


def _module(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def test_peers_are_called_as_they_are_documented(monkeypatch):
    """Stand-ins with the signatures of the versions that peers.py names; what they get is what they should."""
    hidden, weight = torch.randn(6, 8), torch.randn(11, 8)
    labels = torch.arange(6)
    expected = functional.cross_entropy(hidden @ weight.t(), labels)

    def rows(logits, target, ignore_index=-100, reduction="mean", inplace_backward=False):
        return functional.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)

    def head(e, c, targets, impl="cce", chunk_size=4096):
        assert e.shape == (6, 8)
        assert c.shape == (11, 8)
        return functional.cross_entropy(e @ c.t(), targets)

    class Function:
        @staticmethod
        def apply(*arguments):
            """The nine arguments of trl 1.16's ChunkedLogProbFunction."""
            e, c, bias, targets, temperature, chunk_size, softcap, scale, outputs = arguments
            assert (bias, temperature, softcap, scale, outputs) == (None, 1.0, None, 1.0, ())
            assert chunk_size > 0
            return (e @ c.t()).log_softmax(-1).gather(-1, targets[:, None])[:, 0], None, None, None, None

    functions = {"liger_cross_entropy": rows, "liger_fused_linear_cross_entropy": head}
    _module(monkeypatch, "liger_kernel.transformers.functional", **functions)
    _module(monkeypatch, "quack.cross_entropy", cross_entropy=rows)
    _module(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=head)
    _module(monkeypatch, "cut_cross_entropy", linear_cross_entropy=head)
    _module(monkeypatch, "trl.kernels", ChunkedLogProbFunction=Function)
    for name in ("liger_rows", "quack_rows", "quack_rows_inplace"):
        assert torch.allclose(getattr(peers, name)(hidden @ weight.t(), labels), expected), name
    for name in ("liger_head", "cut_head", "cut_head_exact", "trl_head", "quack_head", "torch_head"):
        assert torch.allclose(getattr(peers, name)(hidden, weight, labels), expected), name


def test_a_peer_may_be_imprecise_but_not_wrong():
    workspace = LossWorkspace(cases.Case("small", 8, 300, torch.bfloat16))
    rough = Implementation("rough", "", lambda z, y: functional.cross_entropy(z, y), "ce", package="torch")
    assert workspace.verify(rough)["loss"] > 1e-5
    with pytest.raises(AssertionError, match="rough"):
        workspace.verify(dataclasses.replace(rough, package=None))
    for wrong_loss in (
        lambda z, y: functional.cross_entropy(z.float(), y) + 0.5,
        lambda z, y: functional.cross_entropy(z.float(), y) + 0.1 * (z - z.detach()).float().sum(),
    ):
        with pytest.raises(AssertionError, match="identity peer"):
            workspace.verify(dataclasses.replace(rough, loss=wrong_loss))


# ------------------------------------------------------------------------------------------------------------- steps


def _tiny_steps():
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32_128}
    return step.StepCase("tiny-t5", "t5", shape, 2, 4, 6, torch.float32, None)


def test_a_step_with_each_loss(run_suite):
    """The losses that are one objective agree, and every loss is timed."""
    pytest.importorskip("transformers")
    results = run_suite("step", cases=(_tiny_steps(),), parts=("time",))
    rows = results.of("tiny-t5")
    assert list(rows) == list(step.NAMES)
    assert rows["cross-entropy"]["value"] < rows["eager"]["value"]
    assert all(row["samples"] >= 3 and len(row["step_ms"]) == 3 for row in rows.values())


def test_every_step_changes_the_model():
    pytest.importorskip("transformers")
    made = step.Step(_tiny_steps(), torch.device("cpu"))
    batch = made.case.make_batch(2, torch.device("cpu"))
    weight = made.model.lm_head.weight
    for name in step.NAMES:
        before = weight.detach().clone()
        with step.step_loss(name, made.model) as loss:
            assert torch.isfinite(made.run(loss, batch))
        assert not torch.equal(weight, before), name
        assert weight.grad is None


@pytest.mark.parametrize(("slope", "fixed", "limit"), [(100, 1000, 5000), (1, 0, 77), (10, 0, 10_000)])
def test_the_largest_batch_is_found(slope, fixed, limit):
    tried = []

    def peak(size):
        tried.append(size)
        return None if slope * size > 2 * limit else fixed + slope * size

    found, found_peak = step.largest_batch(peak, 2, limit)
    exact = (limit - fixed) // slope
    assert found <= exact <= found + max(1, found // 16)
    assert found_peak == fixed + slope * found <= limit
    assert max(tried) <= 2 * exact
    with pytest.raises(ValueError, match="a batch of 2 does not fit"):
        step.largest_batch(peak, 2, fixed)
