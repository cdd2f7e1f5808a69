"""The student: one decoder driven by a config, and the weights of Hugging Face models in and out."""

from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.models.huggingface.weights import Pretrained, load_pretrained, save_pretrained

__all__ = ["ModelError", "Pretrained", "load_pretrained", "save_pretrained"]
