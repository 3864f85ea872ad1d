"""What a selector returns, what a selector is, and how two of them join."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

logger = logging.getLogger(__name__)

# One place knows what to pass instead: the error of the default selector, which looks at the model.
HINT_DEFAULT = (
    "Leave out `selector=`: the default takes BatchNorm scales, or queries and keys, and where a "
    "model has neither its error lists what there is to select."
)


class NothingFound(ValueError):  # noqa: N818
    """A model has nothing of what a selector looks for."""


def log_left_out(selector: object, left_out: Mapping[str, str], why: str) -> None:
    """Say which classes are left out for their names, each with the path of one module."""
    for kind, path in left_out.items():
        logger.info(
            "%s leaves out %s, %r for one, which %s. Where that is wrong, state what it holds: "
            'layouts={"%s": {...}}',
            *(type(selector).__name__, kind, path or "the model", why, kind),
        )


@dataclass(frozen=True, repr=False)
class Part:
    """Some entries of one parameter, ``parameter.view(view)[index]``, and the units they make up.

    A mask says which units stay (``True``) and which go, whole: single entries, or blocks of them,
    such as the filters of a convolution or the heads of an attention layer.

    Args:
        name: The parameter's name as in ``model.named_parameters()``.
        view: Shape that the parameter is viewed in before ``index`` is taken; it may only split
            dimensions, so that the result is a view of any memory layout. ``()`` leaves the shape
            alone.
        index: One slice for each leading dimension of the view. ``()`` is all.
        units: How many units the entries hold along each leading dimension, each a divisor of that
            dimension; dimensions left out have one. ``()`` makes every entry a unit of its own.

    Example:
        The query and key rows of a fused projection of width 64, and the same for a layout that
        interleaves query, key and value per head (4 heads of 16):

        >>> import torch
        >>> weight = torch.zeros(192, 64)
        >>> Part("blocks.0.attn.qkv.weight", index=(slice(0, 128),)).entries(weight).shape
        torch.Size([128, 64])
        >>> both = (slice(None), slice(0, 2))
        >>> heads = Part("qkv.weight", view=(4, 3, 16, 64), index=both, units=(4,))
        >>> heads.entries(weight).shape, heads.n_units(weight)
        (torch.Size([4, 2, 16, 64]), 4)
    """

    name: str
    view: tuple[int, ...] = ()
    index: tuple[slice, ...] = ()
    units: tuple[int, ...] = ()

    def entries(self, tensor: Tensor) -> Tensor:
        """These entries of ``tensor``, as a view that shares its memory.

        Args:
            tensor: The parameter, or its gradient, or a mask of its shape; any dtype and strides.

        Returns:
            A view of ``tensor``.
        """
        if self.view:
            tensor = tensor.view(self.view)
        return tensor[self.index] if self.index else tensor

    def n_units(self, tensor: Tensor) -> int:
        """How many units there are: those of ``units``, or else every entry.

        Args:
            tensor: The parameter, or a tensor of its shape.

        Returns:
            The number of entries in a mask.
        """
        return math.prod(self.units) if self.units else self.entries(tensor).numel()

    def write_(self, mask: Tensor, whole: Tensor) -> None:
        """Write what a mask says of each unit to all entries of the unit, in place.

        Args:
            mask: Flat tensor of ``n_units`` values, on any device.
            whole: A tensor of the parameter's shape. Entries that are not this part's stay.

        Example:
            >>> import torch
            >>> whole = torch.ones(2, 4, dtype=torch.bool)
            >>> Part("weight", units=(1, 2)).write_(torch.tensor([True, False]), whole)
            >>> whole
            tensor([[ True,  True, False, False],
                    [ True,  True, False, False]])
        """
        entries = self.entries(whole)
        missing = entries.ndim - len(self.units)
        counts = (*self.units, *(1,) * missing) if self.units else tuple(entries.shape)
        # Each dimension as (units, entries in a unit).
        blocks = [m for n, size in zip(counts, entries.shape, strict=True) for m in (n, size // n)]
        entries.view(blocks).copy_(mask.reshape([m for n in counts for m in (n, 1)]))

    def __repr__(self) -> str:
        """What was given, and nothing of what was not."""
        given = [repr(self.name)]
        for field in ("view", "index", "units"):
            if value := getattr(self, field):
                given.append(f"{field}={value}")
        text = ", ".join(given).replace("slice(None, None, None)", "slice(None)")
        return f"Part({text.replace(', None)', ')')})"


@dataclass(frozen=True, init=False, repr=False)
class Representative:
    """Units that are ranked to draw the mask: a parameter, a part of one, or parts of several.

    Single entries are ranked by their magnitude, units of several entries by the mean magnitude of
    what they have in all ``parts``.

    Args:
        parts: What is ranked: a parameter's name, which is all of its entries; a :class:`Part`; or
            several that make up the same units, as the query rows and the key rows of a head do.
            Each has the same number of units.
        followers: What lives and dies with the same units and has no say in the ranking: truncation
            and pruning reach it too. A name stands for the first part's ``view``, ``index`` and
            ``units`` in another parameter, as a BatchNorm shift follows its scale; a
            :class:`Part` says itself where its units lie.
        selector_index: Which of the selectors of a union ``a | b`` found it, counted from 0;
            ``scope="selector"`` ranks what each found by itself. Only ``|`` sets it.

    Raises:
        TypeError: When a part is neither a name nor a :class:`Part`.
        ValueError: When there are no parts.

    Example:
        A BatchNorm scale and its shift; the 8 filters of a convolution, whose biases go with them:

        >>> Representative("1.weight", followers=("1.bias",))
        Representative('1.weight', followers=('1.bias',))
        >>> filters = Representative(Part("0.weight", units=(8,)), followers=("0.bias",))
        >>> filters.members
        (Part('0.weight', units=(8,)), Part('0.bias', units=(8,)))

        The 4 heads of two projections:

        >>> Representative((Part("q.weight", units=(4,)), Part("k.weight", units=(4,)))).name
        'q.weight'
    """

    parts: tuple[Part, ...]
    followers: tuple[Part, ...]
    selector_index: int

    def __init__(
        self,
        parts: str | Part | Iterable[str | Part],
        followers: str | Part | Iterable[str | Part] = (),
        selector_index: int = 0,
    ) -> None:
        ranked = tuple(Part(p) if isinstance(p, str) else p for p in _listed(parts))
        if not ranked:
            raise ValueError("A Representative needs something to rank: name a parameter.")
        following = (
            replace(ranked[0], name=f) if isinstance(f, str) else f for f in _listed(followers)
        )
        object.__setattr__(self, "parts", ranked)
        object.__setattr__(self, "followers", tuple(following))
        object.__setattr__(self, "selector_index", selector_index)

    @property
    def name(self) -> str:
        """The name of the first parameter."""
        return self.parts[0].name

    @property
    def members(self) -> tuple[Part, ...]:
        """What is ranked, then what follows."""
        return (*self.parts, *self.followers)

    def n_units(self, tensor: Tensor) -> int:
        """How many units are ranked.

        Args:
            tensor: The first part's parameter, or a tensor of its shape.

        Returns:
            The number of scores that this representative has.
        """
        return self.parts[0].n_units(tensor)

    def __repr__(self) -> str:
        """As short as it could have been written."""
        first = self.parts[0]
        text = ", ".join(repr(p.name if p == Part(p.name) else p) for p in self.parts)
        text = text if len(self.parts) == 1 else f"({text})"
        if self.followers:
            alike = [
                repr(f.name if f == replace(first, name=f.name) else f) for f in self.followers
            ]
            text += f", followers=({', '.join(alike)}{',' * (len(alike) == 1)})"
        return f"Representative({text})"


def _listed(given: str | Part | Iterable[str | Part]) -> Sequence[str | Part]:
    """One or several, as several."""
    several = (given,) if isinstance(given, (str, Part)) else tuple(given)
    for each in several:
        if not isinstance(each, (str, Part)):
            raise TypeError(f"A part is a parameter's name or a `Part`, got {each!r}.")
    return several


@runtime_checkable
class Selector(Protocol):
    """Any callable that names a model's representative parameters.

    It looks at types, names and shapes only, never at values, so that it works on meta-device and
    sharded models. The order of the list is the order in which ties are broken.

    Example:
        >>> def last_layer(model: nn.Module) -> list[Representative]:
        ...     return [Representative("1.weight")]
        >>> isinstance(last_layer, Selector)
        True
    """

    def __call__(self, model: nn.Module) -> list[Representative]:
        """The representatives of ``model``, in the order in which ties are broken."""
        ...


class JoinableSelector:
    """What makes ``a | b`` of two selectors, one of which may be a plain function."""

    def __or__(self: Selector, other: Selector) -> JoinedSelector:
        """Both selections, this one first."""
        return JoinedSelector(self, other)

    def __ror__(self: Selector, other: Selector) -> JoinedSelector:
        """Both selections, this one last."""
        return JoinedSelector(other, self)


@dataclass(frozen=True)
class JoinedSelector(JoinableSelector):
    """The representatives of ``first`` and then those of ``second``; each must find some."""

    first: Selector
    second: Selector

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        for selector in (self.first, self.second):
            if not callable(selector):
                raise TypeError(
                    f"`|` joins selectors, callables model -> list of Representative, "
                    f"got {selector!r}."
                )

    def __call__(self, model: nn.Module) -> list[Representative]:
        """Both lists, one after the other."""
        first, second = list(self.first(model)), list(self.second(model))
        n_before = 1 + max((getattr(each, "selector_index", 0) for each in first), default=0)
        return [
            *first,
            *(
                replace(each, selector_index=each.selector_index + n_before)
                if isinstance(each, Representative)
                else each  # `select` refuses it, and says why
                for each in second
            ),
        ]
