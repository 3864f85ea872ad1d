"""Checks of arguments, and warnings that point at the user's line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

# Frames of this package, and of torch, which wraps every step, are not where a user can act.
_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


def warn_user(message: str) -> None:
    """Warn as from the innermost line that is neither this package's nor torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def warn_once(warned: set[str], topic: str, message: str) -> None:
    """Warn of a topic unless it is among those that were warned of, and add it to them."""
    if topic not in warned:
        warned.add(topic)
        warn_user(message)


def check_share(
    name: str, value: Any, *, below_one: bool = False, above_zero: bool = False
) -> float:
    """A share in [0, 1], without 1 when ``below_one`` and without 0 when ``above_zero``."""
    interval = f"{'(' if above_zero else '['}0, 1{')' if below_one else ']'}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be a number in {interval}, got {value!r} of type "
            f"{type(value).__name__}."
        )
    share = float(value)
    # Written so that NaN fails it.
    if not 0 <= share <= 1 or (below_one and share == 1) or (above_zero and share == 0):
        raise ValueError(
            f"`{name}` must be in {interval}, got {value!r}. It is a share, not a percentage or "
            "a count."
        )
    return share


def check_count(name: str, value: Any, *, least: int) -> int:
    """A whole number of at least ``least``."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be a whole number, got {value!r} of type {type(value).__name__}."
        )
    if not isinstance(value, Integral):
        raise ValueError(f"`{name}` must be a whole number, got {value!r}. Round it.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}. Pass a larger one.")
    return int(value)


def check_count_or_share(name: str, value: Any) -> int | float:
    """A whole number of at least 0, or a share in (0, 1)."""
    if isinstance(value, Real) and not isinstance(value, Integral) and 0 < float(value) < 1:
        return float(value)
    return check_count(name, value, least=0)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return str(value)
