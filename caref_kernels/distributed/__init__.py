"""Rows whose columns are sharded over the ranks of a process group."""
