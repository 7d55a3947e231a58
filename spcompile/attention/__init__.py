"""Attention as one op, and the ways to spread it over ranks."""
