"""Warnings that point at the user's line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

# Frames of this package, and of torch, which wraps every step, are not where a user can act.
_NOT_THE_USERS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


def warn_user(message: str) -> None:
    """Warn as from the innermost line that is neither this package's nor torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
