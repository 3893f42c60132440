"""Timing and memory of the loss against its alternatives; `make bench` runs all of it."""
