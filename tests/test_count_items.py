"""``count_items`` gives the divisor of an optimizer step, in one process and over two gloo ranks."""

from __future__ import annotations

import pytest
import torch

from caref_kernels.integrations import count_items

ROWS = torch.tensor([[1, -100, 3, -100], [-100, 5, 6, 7]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize(("shift", "number"), [(True, 4), (False, 5)])
def test_labels_are_counted(dtype, shift, number):
    labels = ROWS.to(dtype)
    for given in (labels, [labels], (row for row in labels), labels.reshape(1, 2, 4)):
        items = count_items(given, shift=shift)
        assert items.item() == number
        assert (items.dtype, items.shape, items.device) == (torch.float32, (), labels.device)
    assert count_items([labels, labels[:1], labels[1:]], shift=shift).item() == 2 * number
    assert count_items(labels, shift=shift, averaged_over=8).item() == number / 8
    assert count_items(labels, shift=shift, averaged_over=0.5).item() == number * 2


def test_a_count_of_zero_is_a_number():
    assert count_items(torch.full((3, 5), -100)).item() == 0
    assert count_items([torch.tensor([[7]]), torch.empty(2, 0, dtype=torch.int64)]).item() == 0


def test_the_default_dtype_does_not_round_the_count():
    number = 2**12 + 1
    torch.set_default_dtype(torch.bfloat16)
    try:
        items = count_items(torch.zeros(1, number + 1, dtype=torch.int64))
    finally:
        torch.set_default_dtype(torch.float32)
    assert items.item() == number
    assert items.dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (3, TypeError, "labels must be a tensor or an iterable of tensors; got int"),
        ("labels", TypeError, "labels must be a tensor or an iterable of tensors; got str"),
        ([], ValueError, "labels must have at least one tensor, got none: .* pass a tensor of -100"),
        ({"labels": ROWS}, TypeError, r"labels\[0\] must be a tensor; got str; of batches pass batch\['labels'\]"),
        ([ROWS, {"labels": ROWS}], TypeError, r"labels\[1\] must be a tensor; got dict; of batches pass"),
        ([[1, 2]], TypeError, r"labels\[0\] must be a tensor; got list$"),
        (ROWS.float(), TypeError, "labels must have an integer dtype; got torch.float32"),
        (ROWS != -100, TypeError, "labels must have an integer dtype; got torch.bool"),
        ([ROWS, torch.tensor(1)], ValueError, r"labels\[1\] must have at least one dimension, .* got a 0-D tensor"),
        ([ROWS, ROWS.to("meta")], ValueError, r"labels\[1\] must be on the device of the first, cpu; got meta"),
    ],
)
def test_labels_are_checked(labels, error, message):
    with pytest.raises(error, match=f"^{message}"):
        count_items(labels)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shift": 1}, TypeError, "shift must be True or False; got 1"),
        ({"averaged_over": True}, TypeError, "averaged_over must be a positive number; got True"),
        ({"averaged_over": "2"}, TypeError, "averaged_over must be a positive number; got '2'"),
        ({"averaged_over": torch.tensor(2)}, TypeError, "averaged_over must be a positive number; got tensor"),
        ({"averaged_over": 0}, ValueError, "averaged_over must be a positive, finite number; got 0"),
        ({"averaged_over": float("inf")}, ValueError, "averaged_over must be a positive, finite number; got inf"),
        ({"averaged_over": float("nan")}, ValueError, "averaged_over must be a positive, finite number; got nan"),
        ({"group": "world"}, ValueError, "group must be None where torch.distributed is not initialised; got 'world'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        count_items(ROWS, **options)


def test_two_ranks_count_together(tmp_path):
    ranks = pytest.importorskip("ranks", reason="needs torch built with distributed")
    counting_ranks = pytest.importorskip("counting_ranks", reason="needs torch built with distributed")
    ranks.start(counting_ranks.run, 2, tmp_path)
