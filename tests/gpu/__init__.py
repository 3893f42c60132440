"""Tests that need a GPU (marker ``gpu``), and what ``make gpucheck`` adds to pytest."""
