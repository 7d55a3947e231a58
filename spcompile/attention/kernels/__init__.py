"""Kernels that compute attention exactly, and the state that rows carry from one hop to the next."""
