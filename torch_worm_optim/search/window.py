"""The sliding window: the last masks, one bit an entry each, and how far apart they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_WORD = 64  # bits
_MASKS_PER_BYTE = 8  # in the form that checkpoints hold


class Window:
    """The last masks of a search, packed in host memory wherever the weights are.

    Each representative begins at a 64-bit word of its own, so that it can be compared and saved by
    itself.

    Args:
        numels: How many entries of each representative a mask has.
        n_masks: How many masks are held, the newest counted.

    Example:
        >>> window = Window([2, 3], n_masks=2)
        >>> window.push(torch.tensor([True, False, True, True, True]))
        >>> window.push(torch.tensor([True, True, True, False, False]))
        >>> window.newest()
        [tensor([True, True]), tensor([ True, False, False])]
        >>> window.differences()
        [[1, 2]]
    """

    def __init__(self, numels: Sequence[int], n_masks: int) -> None:
        self.numels, self.n_masks = list(numels), n_masks
        # At least one word each, since numpy cannot sum up an empty run of words.
        ends = np.cumsum([0, *(numel // _WORD + 1 for numel in self.numels)])
        self._starts = ends[:-1]
        self._rows = [np.zeros(ends[-1], dtype=np.uint64) for _ in range(n_masks)]  # newest first

    def push(self, mask: Tensor) -> None:
        """Add a mask as the newest; the oldest falls out.

        Args:
            mask: Bool tensor of shape ``(sum(numels),)``, **True = kept**, on any device.
        """
        self._rows.insert(0, self._rows.pop())
        for index, kept in enumerate(torch.split(mask.cpu(), self.numels)):
            self._write(0, index, kept.numpy())

    def newest(self) -> list[Tensor]:
        """The mask pushed last.

        Returns:
            For each representative a bool tensor of shape ``(numel,)``, **True = kept**; copies.
        """
        return [torch.from_numpy(self._read(0, index)) for index in range(len(self.numels))]

    def differences(self) -> list[list[int]]:
        """On how many entries the newest mask differs from each older one.

        Returns:
            For each older mask, oldest first, a count for each representative.
        """
        newest, *older = self._rows
        counts = [
            np.add.reduceat(np.bitwise_count(newest ^ row), self._starts, dtype=np.int64)
            for row in reversed(older)
        ]
        return [each.tolist() for each in counts]

    def to_bytes(self, index: int) -> list[Tensor]:
        """All masks of one representative, eight of them in a byte, for a checkpoint.

        Args:
            index: Which representative.

        Returns:
            ``ceil(n_masks / 8)`` uint8 tensors of shape ``(numel,)``. In the first, bit ``i`` of a
            byte is that entry in the mask pushed ``i`` pushes ago; the next goes on from there.
        """
        rows = []
        for first in range(0, self.n_masks, _MASKS_PER_BYTE):
            row = np.zeros(self.numels[index], dtype=np.uint8)
            for age in range(first, min(first + _MASKS_PER_BYTE, self.n_masks)):
                row |= self._read(age, index).view(np.uint8) << np.uint8(age - first)
            rows.append(torch.from_numpy(row))
        return rows

    def from_bytes(self, index: int, rows: Sequence[Tensor]) -> None:
        """Restore what :meth:`to_bytes` returned.

        Args:
            index: Which representative.
            rows: Its bytes, on any device.
        """
        for age in range(self.n_masks):
            row = rows[age // _MASKS_PER_BYTE].cpu().numpy()
            self._write(age, index, row >> np.uint8(age % _MASKS_PER_BYTE) & np.uint8(1))

    def _bytes(self, age: int, index: int) -> npt.NDArray[np.uint8]:
        """The packed mask of a representative, as a view."""
        first = int(self._starts[index]) * (_WORD // 8)
        return self._rows[age].view(np.uint8)[first : first + (self.numels[index] + 7) // 8]

    def _write(self, age: int, index: int, kept: npt.NDArray[np.bool_ | np.uint8]) -> None:
        """Pack a mask of 0 and 1 into its place."""
        self._bytes(age, index)[:] = np.packbits(kept, bitorder="little")

    def _read(self, age: int, index: int) -> npt.NDArray[np.bool_]:
        """A mask unpacked, one byte an entry."""
        packed = self._bytes(age, index)
        unpacked = np.unpackbits(packed, count=self.numels[index], bitorder="little")
        return unpacked.view(np.bool_)
