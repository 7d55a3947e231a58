"""Switched on in accelerate and in the Trainer of transformers."""
