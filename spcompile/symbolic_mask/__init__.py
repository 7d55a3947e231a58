"""Reads a dense attention mask, built by index arithmetic in the graph, back as a formula over its indices.

values.py    what one element can be: an integer expression, a condition, a number, or a choice between such
views.py     ops that only move elements, as maps from result indices to operand indices
reader.py    one element of a graph node as such a value
match.py     a condition over (b, q, k) as an AttentionMask and the vectors that it needs
vectors.py   a condition or id over (b, k) written back into the graph as a [B, T] vector
"""

from __future__ import annotations
