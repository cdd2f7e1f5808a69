"""Quantized checkpoints, read as if their tensors were stored in floating point."""
