"""Switched on in accelerate, the Trainer of transformers, Lightning and Fabric."""
