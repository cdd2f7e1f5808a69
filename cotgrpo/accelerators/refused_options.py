"""Explain one of XLA's options that the compiler refuses, by the setting that it comes from."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from cotgrpo.compiler_options.measured import MEASURED
from cotgrpo.config import ConfigError

REFUSED = re.compile(r"No such compile option: '(?P<name>\w+)'|While setting option (?P<set>\w+), (?P<why>[^\n]*)")


@contextlib.contextmanager
def explain_refused_option() -> Iterator[None]:
    """Turn the compiler's error on an option into a ConfigError of one line.

    Raises:
        ConfigError: the compiler does not know an option, or its value.
    """
    try:
        yield
    except RuntimeError as error:  # jax.errors.JaxRuntimeError is one
        found = REFUSED.search(str(error))
        if found is None:
            raise
        name = found["name"] or found["set"]
        why = f"this machine's compiler has no option {name}" if found["name"] else f"option {name}: {found['why']}"
        advice = f"take {name} out of compiler.options"
        if any(option.name == name for option in MEASURED):
            advice += ", or set compiler.measured to false if it is not in there"
        raise ConfigError(f"compiler.options: {why.rstrip('. ')}; {advice}.") from error
