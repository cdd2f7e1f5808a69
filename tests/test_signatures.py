"""The parameters of the package have types: few of them are `Any`."""

from __future__ import annotations

from helpers.any_share import CORE, any_share


def test_few_parameters_of_the_core_are_any() -> None:
    count, total = any_share(CORE)
    assert total > 0 and count / total <= 0.05, f"{count} of {total}: `python tests/helpers/any_share.py` lists them"


def test_few_parameters_of_the_package_are_any() -> None:
    count, total = any_share()
    assert total > 0 and count / total <= 0.10, f"{count} of {total}: `python tests/helpers/any_share.py` lists them"
