"""Adapters to other libraries, imported by name: ``import caref_kernels`` loads none of them."""
