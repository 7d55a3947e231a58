"""Switched on in the tools that people train with: accelerate, and the Trainer of transformers."""
