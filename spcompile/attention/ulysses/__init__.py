"""Ulysses: all-to-alls give each rank whole rows of some heads, and take them back."""
