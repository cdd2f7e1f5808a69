"""Jitted generation with a key/value cache: settings and filters, prompts and replies, the decode loop."""

from cotgrpo.sampling.decode_loop import QUEUE, Sampler, make_sampler
from cotgrpo.sampling.prompts import Prompts, Replies, pad_prompts
from cotgrpo.sampling.settings import SamplingSettings, filter_logits

__all__ = [
    "QUEUE",
    "Prompts",
    "Replies",
    "Sampler",
    "SamplingSettings",
    "filter_logits",
    "make_sampler",
    "pad_prompts",
]
