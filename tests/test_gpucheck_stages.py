"""The stages of gpucheck on the CPU: they hold for the backend that is there, and each catches its planted bugs."""

from __future__ import annotations

import itertools
import json

import cuda_emulated
import pytest
import torch

from caref_kernels import backends
from caref_kernels.gpucheck import large_checks, planted, run_checks, sanitizer, shape_checks, subject, value_checks
from caref_kernels.gpucheck.fence import GUARD_BYTES, Fence
from caref_kernels.gpucheck.report import judge
from caref_kernels.gpucheck.subject import Check, Subject, Unsupported

HOST = Subject("cpu", "cpu", scale=0.5)


@pytest.fixture(autouse=True)
def _needs_the_compiled_backend(monkeypatch):
    reason = backends.get("cpu").unsupported(torch.empty(1, 2))
    if reason is not None:
        pytest.skip(reason)
    # what is planted stays in this test
    monkeypatch.setattr(backends, "_BACKENDS", dict(backends._BACKENDS))


def _first(count):
    return lambda checks: lambda one: itertools.islice(checks(one), count)


STAGES = {
    "smoke": (value_checks.smoke, {"TailDropped", "StrayWrite", "Unwritten", "InputChanged", "AuxiliaryDropped"}),
    "accuracy": (_first(6)(value_checks.accuracy), {"TailDropped", "AuxiliaryDropped", "IncomingIgnored"}),
    "special": (value_checks.special, {"NanSwallowed"}),
    "labels": (value_checks.labels, {"LabelWrapped"}),
    "layouts": (_first(8)(shape_checks.layouts), {"StrideAssumed"}),
    "autograd": (shape_checks.autograd, {"IncomingIgnored", "AuxiliaryDropped"}),
    "topk": (_first(9)(value_checks.topk), {"TailDropped", "AuxiliaryDropped"}),
    "heads": (shape_checks.heads, {"TailDropped", "AuxiliaryDropped"}),
    "determinism": (run_checks.determinism, {"Noisy"}),
    "opcheck": (_first(1)(run_checks.opcheck), set()),
    "large": (large_checks.large, {"Offset32"}),
    "fuzz": (lambda one: large_checks.fuzz(one, count=12), {"TailDropped", "StrayWrite"}),
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_pass_and_catch_what_is_planted(name, monkeypatch):
    monkeypatch.setattr(planted.Offset32, "bits", 16)  # the stride of the small shapes
    checks, bugs = STAGES[name]
    found = subject.run_checks(HOST, checks(HOST), seconds=120)
    assert judge(found) == ("pass", ""), found
    assert found["controls"] == dict.fromkeys(bugs, "caught")
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("bug", "stage"),
    [
        *((bug, "smoke") for bug in sorted(STAGES["smoke"][1])),
        ("IncomingIgnored", "autograd"), ("NanSwallowed", "special"), ("LabelWrapped", "labels"),
        ("StrideAssumed", "layouts"), ("Noisy", "determinism"),
    ],
)  # fmt: skip
def test_a_broken_backend_fails(bug, stage):
    """The subject itself has the bug: the stage fails, and says where."""
    broken = Subject(HOST.with_bug(bug).backend, "cpu", "cpu", 0.5)
    found = subject.run_checks(broken, (one._replace(bugs=()) for one in STAGES[stage][0](broken)), seconds=60)
    status, detail = judge(found)
    assert status == "fail"
    assert "cases failed" in detail
    assert all(case and message for case, message in found["failed"])


def test_a_control_that_passes_makes_the_stage_invalid():
    found = subject.run_checks(HOST, [Check("blind", lambda one: None, ("TailDropped",))], seconds=9)
    assert judge(found) == ("invalid", "planted bugs not caught: TailDropped (blind passed)")


def test_a_control_is_not_caught_by_an_accident():
    """Only a failed assertion counts: an error of the check itself would catch everything."""

    def check(one):
        if one.backend != one.clean:
            raise TypeError("of the check")

    found = subject.run_checks(HOST, [Check("odd", check, ("Noisy",))], seconds=9)
    assert judge(found)[0] == "invalid"
    assert found["controls"]["Noisy"].startswith("odd ended with TypeError")


def test_what_could_not_run_is_never_a_pass():
    def refuse(_one):
        raise Unsupported("too small")

    found = subject.run_checks(HOST, [Check("held", lambda one: None), Check("too large", refuse)], seconds=9)
    assert judge(found) == ("unsupported", "1 cases could not run, 1 passed; too large: too small")
    assert judge(subject.run_checks(HOST, [], seconds=9)) == ("invalid", "no case was checked")
    late = subject.run_checks(HOST, [Check("never", lambda one: None)], seconds=-1)
    assert judge(late)[0] == "fail"
    assert late["failed"] == [["time", "1 cases were left when -1 s were over"]]
    assert subject.run_checks(HOST, [Check("never", lambda one: None)], -1, open_ended=True)["failed"] == []


def test_a_lost_device_ends_the_stage():
    def lost(_one):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    found = subject.run_checks(HOST, [Check("first", lost), Check("second", lambda one: None)], seconds=9)
    assert [case for case, _ in found["failed"]] == ["first"]
    assert found["cases"] == 1


def test_the_largest_error_is_kept_with_its_case():
    sizes = {"small": 1e-7, "large": 3e-6, "middle": 2e-6}
    checks = [Check(name, lambda one, error=error: {"loss": error}) for name, error in sizes.items()]
    assert subject.run_checks(HOST, checks, seconds=9)["worst"] == {"loss": [3e-6, "large"]}


def test_every_bug_is_planted_somewhere():
    """On a GPU every one must be caught by some stage."""
    here = set().union(*(bugs for _, bugs in STAGES.values()))
    gpu = Subject("cpu", "cpu")
    there = {
        bug
        for stage in (run_checks.graphs, run_checks.sync, run_checks.memory)
        for one in stage(gpu)
        for bug in one.bugs
    }
    assert here | there | {"DefaultStream"} == set(planted.BUGS)
    assert not here & there


# ------------------------------------------------------------------------------------------------------------- fence


@pytest.mark.parametrize("offset", [-1, 0, GUARD_BYTES // 4 - 1])
def test_a_write_beside_an_output_is_found(offset):
    def write():
        with Fence().watch():
            out = torch.empty(10, dtype=torch.float32)
            place = out.storage_offset() + (10 + offset if offset >= 0 else offset)
            torch.as_strided(out, (1,), (1,), place).fill_(1)

    with pytest.raises(AssertionError, match="4 bytes .* of 40 bytes were overwritten"):
        write()


def test_fresh_memory_is_poisoned_and_constants_are_guarded():
    original = torch.empty
    fence = Fence()
    values = torch.arange(12.0).view(3, 4)
    constant = fence.constant(values)
    assert torch.equal(constant, values)
    assert constant.is_contiguous()
    assert constant._base is None
    with fence.watch():
        assert torch.empty(2, 3, dtype=torch.bfloat16).isnan().all()
        assert torch.empty((4,), dtype=torch.float64).shape == (4,)
        assert torch.empty(2, device="meta").device.type == "meta"
        assert torch.empty(0).numel() == 0
        assert torch.as_strided(constant, (13,), (1,), constant.storage_offset())[12] > 1e15
    assert torch.empty is original
    constant[1, 1] = -5
    with pytest.raises(AssertionError, match=r"an input of shape \(3, 4\) was changed"):
        fence.check()


def test_an_error_inside_is_not_hidden_by_the_fence():
    original = torch.empty
    with pytest.raises(KeyError, match="inside"), Fence().watch():
        raise KeyError("inside")
    assert torch.empty is original


@pytest.mark.skipif(cuda_emulated.compiler() is None, reason="no C++ compiler")
def test_what_the_sanitizer_watches_runs():
    """On the emulated device, which like a GPU makes a NaN of a label that is no column; every fifth call."""
    device = Subject(cuda_emulated.NAME, "cpu", scale=0.2)
    sanitizer.drive(device)
    with pytest.raises(AssertionError, match="were overwritten"):
        sanitizer.drive(device.with_bug("StrayWrite"))
