"""Checks of what you bring yourself, to be called in your tests."""

from cotgrpo.testing.objectives import check_objective

__all__ = ["check_objective"]
