"""Guard zones around every tensor that a backend reads or writes, and NaN in every fresh one.

A write outside an output changes a guard zone; a read outside an input yields 1.5e16 in float32 and similar values in
the other dtypes; an element that is not written is NaN.  The backends allocate with ``torch.empty``, so that replacing
it for the time of a call reaches outputs, statistics and workspaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# A multiple of every alignment; longer than a tile of the kernels.
GUARD_BYTES = 16384
PATTERN = 0x5A


class GuardZones:
    """Guarded tensors, and the check that neither their zones nor the constants have changed."""

    def __init__(self) -> None:
        self._zones: list[tuple[str, Tensor, int, int]] = []
        self._constants: list[tuple[Tensor, Tensor]] = []

    def constant(self, values: Tensor) -> Tensor:
        """A guarded copy of ``values`` that must not change; contiguous, not a view."""
        guarded = self._allocate(values.shape, values.dtype, values.device, "input")
        guarded.copy_(values)
        self._constants.append((guarded, guarded.clone()))
        return guarded

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Guard what ``torch.empty`` makes inside, and fill it with NaN; check everything at the end, and forget it.

        Raises:
            AssertionError: a zone or a constant has changed.
        """
        original = torch.empty

        def empty(*arguments, **options) -> Tensor:
            plain = original(*arguments, **options)
            if plain.numel() == 0 or plain.device.type == "meta" or plain.requires_grad or plain.is_pinned():
                return plain
            guarded = self._allocate(plain.shape, plain.dtype, plain.device, "output", original)
            if guarded.is_floating_point():
                guarded.fill_(float("nan"))
            return guarded

        torch.empty = empty
        try:
            yield
        finally:
            torch.empty = original
        self._check()

    def _check(self) -> None:
        zones, constants = self._zones, self._constants
        self._zones, self._constants = [], []
        for kind, memory, first, last in zones:
            for side, zone in (("before", memory[:first]), ("after", memory[last:])):
                if not bool((zone == PATTERN).all()):
                    places = (zone != PATTERN).nonzero().flatten()
                    offset = int(places[0]) if side == "after" else int(places[-1]) - zone.numel()
                    raise AssertionError(
                        f"{len(places)} bytes {side} an {kind} of {last - first} bytes were overwritten, "
                        f"the nearest at {offset:+d}"
                    )
        for guarded, values in constants:
            if not torch.equal(guarded.view(torch.uint8), values.view(torch.uint8)):
                raise AssertionError(f"an input of shape {tuple(guarded.shape)} was changed")

    def _allocate(self, shape, dtype, device, kind: str, allocate=torch.empty) -> Tensor:
        size = dtype.itemsize * shape.numel()
        padded = -(-size // GUARD_BYTES) * GUARD_BYTES
        memory = allocate(padded + 2 * GUARD_BYTES, dtype=torch.uint8, device=device).fill_(PATTERN)
        self._zones.append((kind, memory, GUARD_BYTES, GUARD_BYTES + size))
        # Not a view, as autograd sees it: an output of an operator must not be one.
        strides = [1] * len(shape)
        for index in range(len(shape) - 2, -1, -1):
            strides[index] = strides[index + 1] * max(shape[index + 1], 1)
        bare = allocate(0, dtype=dtype, device=device)
        return bare.set_(memory.untyped_storage(), GUARD_BYTES // dtype.itemsize, shape, tuple(strides))
