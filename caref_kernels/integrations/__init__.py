"""Adapters to other libraries, imported by name: ``import caref_kernels`` loads none of them."""

from .counting import count_items

__all__ = ["count_items"]
