"""Ulysses: rows are exchanged for heads before attention, and back behind it."""
