"""Explain an allocation that failed, on the host or on a device, by the settings that would have made it smaller."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

from cotgrpo.accelerators.memory import TooLarge
from cotgrpo.config import ConfigError

MARKS = re.compile(r"RESOURCE_EXHAUSTED|out of memory|bad_alloc|failed to allocate", re.IGNORECASE)
ASKED = re.compile(r"allocat\w* ([0-9]{4,}) ?bytes|allocat\w*[^0-9]{1,20}([0-9.]+ ?[KMGT]i?B?)\b", re.IGNORECASE)


@contextlib.contextmanager
def explain_out_of_memory(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an allocation that failed into a ConfigError of one line.

    Args:
        advice: returns which settings to change, and what is known about the need.

    Raises:
        ConfigError: "Out of memory: 7.1 GB could not be allocated. ...", or what a check before the first step found.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # jax.errors.JaxRuntimeError is a RuntimeError
        if not isinstance(error, MemoryError) and not MARKS.search(str(error)):
            raise
        if isinstance(error, TooLarge):
            raise ConfigError(f"Out of memory: {error}. {advice()}") from error
        raise ConfigError(f"Out of memory: {asked_for(str(error))} could not be allocated. {advice()}") from error


def asked_for(message: str) -> str:
    """Return how much an error says was asked for."""
    found = ASKED.search(message)
    if found is None:
        return "an array"
    return f"{int(found[1]) / 1e9:.1f} GB" if found[1] else found[2]
