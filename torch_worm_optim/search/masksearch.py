"""A search: the representatives of a model, and the window of the masks drawn of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_worm_optim._binding import Binding
from torch_worm_optim._checks import warn_once
from torch_worm_optim.distributed import canonical_name, check_gatherable, whole_tensor
from torch_worm_optim.report import KeptCount, kept_counts
from torch_worm_optim.search.mask import Mask, Scores, compute_mask, fingerprint, unit_magnitudes
from torch_worm_optim.search.rule import MaskSample, Phase, SearchSettings
from torch_worm_optim.search.window import Window, unpack
from torch_worm_optim.selectors import Representative

# When more than this share of the entries tie for a mask, their order decides more than training.
_MANY_TIES = 0.05


class MaskSearch:
    """Draws masks of a model's representatives, and remembers the last ones.

    Sharded parameters are gathered one at a time, so drawing a mask is then a collective call, and
    its result is equal on all ranks.
    """

    def __init__(
        self,
        representatives: Sequence[Representative],
        settings: SearchSettings,
        binding: Binding,
    ) -> None:
        self.representatives, self.settings = tuple(representatives), settings
        self.binding = binding
        self.numels = [
            each.n_units(_on_meta(binding.parameter(each.name))) for each in representatives
        ]
        self.window = Window(sum(self.numels), settings.window)
        # Of each representative when the newest mask was drawn.
        self.fingerprints: list[int] = []
        # Which have not moved since the first mask; none if that was drawn before a resume.
        self._still: set[int] = set()

    def sample(self, step: int, phase: Phase, warned: set[str]) -> MaskSample | None:
        """Draw a mask and let the rule decide; None if nothing has moved since the last mask."""
        ranked = [part for each in self.representatives for part in each.parts]
        self.binding.check_trained(part.name for part in ranked)
        fingerprints = self._fingerprints(phase)
        if fingerprints == self.fingerprints:
            warn_once(
                warned,
                "nothing moved",
                f"Nothing that is ranked has moved since the last mask, {ranked[0].name!r} for "
                "one, so no mask is drawn: equal masks of weights that are not trained would pass "
                "for a ticket. Look for a learning rate of 0 or gradients that never come, and "
                "start the search once these parameters are trained, or select others that are.",
            )
            return None
        mask, n = self._draw(), self.window.n_entries
        if mask.n_tied > _MANY_TIES * n:
            warn_once(
                warned,
                "ties",
                f"{mask.n_tied} of {n} entries tie for the mask: they have the very same magnitude "
                "and only their order decides which go. Freshly initialised BatchNorm scales are "
                "all 1 and do this. Let training move them before the first mask (a larger "
                "`sample_every`), or check that the selected parameters are trained at all.",
            )
        if not self.window.rows:
            self._still = set(range(len(fingerprints)))
        pairs = zip(fingerprints, self.fingerprints, strict=False)  # the first mask has no older
        self._still -= {index for index, (new, old) in enumerate(pairs) if new != old}
        if self._still and len(self.window.rows) == self.window.n_masks - 1:
            self._warn_of_still(warned)
        self.window.push(np.concatenate(mask.kept))
        sample = self.settings.decide(step, phase, self.window.distances())
        fading = self.settings.fades(sample.phase)
        self.fingerprints = self._fingerprints(sample.phase) if fading else fingerprints
        return sample

    def _fingerprints(self, phase: Phase) -> list[int]:
        """A number for each representative that changes where training moves it."""
        return [
            fingerprint(self._moved_by_training(each, index, phase))
            for index, each in enumerate(self.representatives)
        ]

    def _moved_by_training(
        self, representative: Representative, index: int, phase: Phase
    ) -> Iterator[Tensor]:
        """The entries that are ranked, zeros where they fade unless all of them do."""
        kept = self.newest(index) if self.settings.fades(phase) else None
        for part in representative.parts:
            whole = self._whole(part.name)
            if kept is not None and kept.any():
                removed = torch.zeros(whole.shape, dtype=torch.bool, device="cpu")
                part.write_(~kept, removed)
                whole = whole.masked_fill(removed.to(whole.device), 0)
            yield part.entries(whole)

    def _warn_of_still(self, warned: set[str]) -> None:
        """Warn of representatives that have not moved since the first mask."""
        share = 100 * sum(self.numels[i] for i in self._still) / sum(self.numels)
        first = self.representatives[min(self._still)].name
        warn_once(
            warned,
            "still",
            f"{len(self._still)} of {len(self.numels)} representatives, {share:.0f} % of the "
            f"ranked entries, have not moved since the first mask, {first!r} for one. Their masks "
            "are equal because they are not trained, and pass for a ticket. Look for a learning "
            "rate of 0 or gradients that never come. Start the search once they are trained, or "
            "pass a `selector=` that leaves them out.",
        )

    def _draw(self) -> Mask:
        """The mask of the weights as they are now."""
        return compute_mask(
            [
                self._scores(each, numel)
                for each, numel in zip(self.representatives, self.numels, strict=True)
            ],
            self.settings.prune_ratio,
            scope=self.settings.scope,
            min_keep=self.settings.min_keep,
            groups=[each.selector_index for each in self.representatives],
        )

    def _scores(self, representative: Representative, numel: int) -> Scores:
        """What a representative is ranked by: its entries, or the magnitudes of its units."""
        parts = representative.parts
        names = " and ".join(dict.fromkeys(part.name for part in parts))

        def read(whole: Callable[[str], Tensor]) -> Tensor:
            if not parts[0].units:
                return parts[0].entries(whole(parts[0].name))
            return unit_magnitudes(part.blocks(whole(part.name)) for part in parts)

        dtype = read(lambda name: _on_meta(self.binding.parameter(name))).dtype
        return Scores(names, numel, dtype, lambda: read(self._whole))

    def _whole(self, name: str) -> Tensor:
        """A parameter, gathered from all ranks."""
        parameter = self.binding.parameter(name)
        check_gatherable(name, parameter)
        return whole_tensor(parameter)

    def newest(self, index: int) -> Tensor:
        """The newest mask of one representative, a bool for each unit, **True = kept**."""
        start = sum((n + 7) // 8 for n in self.numels[:index])
        return unpack(self.window.rows[-1][start:], self.numels[index])

    def kept_counts(self) -> list[KeptCount]:
        """How much the newest mask keeps of each representative."""
        kept: list[int | None] = [None] * len(self.numels)
        if self.window.rows:
            kept = [int(self.newest(index).sum()) for index in range(len(self.numels))]
        return kept_counts(self.representatives, self.numels, kept)

    def identity(self) -> dict[str, Any]:
        """What the masks depend on; two searches that differ in it cannot share a window."""
        names = ("prune_ratio", "scope", "min_keep", "window")
        return {
            "representatives": [_canonical(each) for each in self.representatives],
            "sizes": self.numels,
            "groups": [each.selector_index for each in self.representatives]
            if self.settings.scope == "selector"
            else [],
            **{name: getattr(self.settings, name) for name in names},
        }


def _on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and strides without data, whole where a rank holds a part."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _canonical(representative: Representative) -> str:
    """A representative in words that do not depend on how the model is wrapped."""
    bare = [replace(part, name=canonical_name(part.name)) for part in representative.members]
    n = len(representative.parts)
    return repr(Representative(bare[:n], bare[n:]))
