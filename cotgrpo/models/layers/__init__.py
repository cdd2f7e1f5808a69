"""Kinds of layers besides attention and the gated MLP, each with its options."""
