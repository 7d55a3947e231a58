"""Switched on in accelerate, the Trainer of transformers, Lightning, Fabric, torchtitan."""
