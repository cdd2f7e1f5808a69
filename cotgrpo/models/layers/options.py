"""Options of a decoder's layers that take several numbers, as frozen dataclasses: fields of `DecoderConfig`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PerLayerEmbeddings:
    """A second embedding, from which every layer reads a vector of its own (`layers/per_layer_embeddings.py`).

    Attributes:
        width: P, numbers per token and layer (`hidden_size_per_layer_input`).
        vocab_size: rows of the table (`vocab_size_per_layer_input`).

    Raises:
        ValueError: a size is not positive.
    """

    width: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("width", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"PerLayerEmbeddings.{name} must be at least 1, got {getattr(self, name)}.")

    def num_params(self, width: int, num_layers: int) -> int:
        """Return the number of parameters outside the layers, with D `width`: table, projection and its norm."""
        return (self.vocab_size + width) * num_layers * self.width + self.width
