"""Dense masks, built by index arithmetic, read back as formulas over their indices.

values.py    what one element can be: an integer expression, a condition, a number, or a choice between such
views.py     ops that only move elements, as maps from result indices to operand indices
reader.py    one element of a graph node as such a value; arithmetic.py and lookups.py say how, op by op
match.py     a condition over (b, q, k) as an AttentionMask and the vectors that it needs
vectors.py   a condition or id over (b, k) written back into the graph as a [B, T] vector
bias_terms.py  an attention bias taken apart into terms that can be read one by one
split_bias.py  which of them a mask and slopes can say
bits.py      scores that are multiplied by a mask of 0 and 1
fills.py     rows that see no key, where masked scores are finite
alibi.py     a bias that grows with the distance of positions, as slopes
"""

from __future__ import annotations

from spcompile.recognition.masks import arithmetic, lookups

__all__ = ["arithmetic", "lookups"]
