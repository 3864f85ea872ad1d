"""The sliding window: the last masks, one bit an entry each, and how far apart they are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bits = npt.NDArray[np.uint8]


def pack(mask: Tensor) -> Bits:
    """A bool tensor as bits, eight in a byte."""
    return np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little")


def unpack(bits: Bits, n: int) -> Tensor:
    """The first n of these bits, as a bool tensor in one dimension."""
    return torch.from_numpy(np.unpackbits(bits, count=n, bitorder="little").view(np.bool_))


class Window:
    """The last masks of a search, packed in host memory wherever the weights are."""

    def __init__(self, n_entries: int, n_masks: int) -> None:
        self.n_entries, self.n_masks = n_entries, n_masks
        self.rows: list[Bits] = []  # oldest first

    def push(self, row: Bits) -> None:
        """Add a mask as the newest; the oldest falls out of a full window."""
        self.rows = [*self.rows, row][-self.n_masks :]

    def distances(self) -> tuple[float, ...]:
        """The share of entries on which the newest mask differs from each older one, oldest first.

        Nothing is compared until the window is full.
        """
        if len(self.rows) < self.n_masks:
            return ()
        *older, newest = self.rows
        return tuple(int(np.bitwise_count(newest ^ row).sum()) / self.n_entries for row in older)
