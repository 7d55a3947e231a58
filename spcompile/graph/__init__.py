"""Graphs as such: edited, printed, spliced, and the nodes in them that say where a value is split."""
