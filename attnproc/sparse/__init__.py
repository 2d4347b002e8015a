"""Sparse attention, one file per method."""
