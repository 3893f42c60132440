"""Checks of compiled kernels that need no GPU: ``make aot`` and ``make nvcc-check``."""
