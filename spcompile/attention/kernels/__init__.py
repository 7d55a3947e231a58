"""Kernels that compute attention exactly, and the state carried between hops."""
