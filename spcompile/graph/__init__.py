"""Graphs as such: edited, printed, spliced; reshards, and where they split a value."""
