"""What CUDA devices there are, asked once.

Dynamo traces through ``functools.cache``, with a warning for the user, so torch is asked each time that code is traced:
these two questions are constants to Dynamo.
"""

from __future__ import annotations

import functools

import torch


def has_device() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available() if torch.compiler.is_compiling() else _has_device()


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    if torch.compiler.is_compiling():
        properties = torch.cuda.get_device_properties(device)
        return properties.major, properties.minor
    return _capability(device)


@functools.cache
def _has_device() -> bool:
    return torch.cuda.is_available()


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
