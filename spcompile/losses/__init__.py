"""Losses of linear heads as one op, which never holds all of the logits."""
