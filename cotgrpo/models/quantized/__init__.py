"""Frozen kernels in four or eight bits, for QLoRA: their arrays (`kernel`), and how they are made (`quantize`)."""
