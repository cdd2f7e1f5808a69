"""The student: one decoder, driven by a config; families of Hugging Face models as data; their weights in and out."""

from cotgrpo.models.huggingface.families import ModelError
from cotgrpo.models.huggingface.weights import Pretrained, load_pretrained, save_pretrained

__all__ = ["ModelError", "Pretrained", "load_pretrained", "save_pretrained"]
