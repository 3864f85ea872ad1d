"""What a selector returns, what a selector is, and how two of them join."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

logger = logging.getLogger(__name__)


class NothingFound(ValueError):  # noqa: N818
    """A model has nothing of what a selector looks for."""


def nothing_found(what: str, model: nn.Module) -> NothingFound:
    """That error, with one hint: the default selector looks at the model and lists the rest."""
    return NothingFound(
        f"{what} in {type(model).__name__}. Leave out `selector=`: the default takes BatchNorm "
        "scales, or queries and keys, and where a model has neither its error lists what there is "
        "to select."
    )


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

    A mask keeps or removes whole units: single entries, or blocks of them, such as the filters of a
    convolution or the heads of an attention layer.

    Args:
        name: The parameter's name as in ``model.named_parameters()``.
        view: Shape that the parameter is viewed in first; it may only split dimensions.
        index: One slice for each leading dimension of the view.
        units: How many units the entries hold along each leading dimension, each a divisor of that
            dimension. ``()`` makes every entry a unit of its own.

    Example:
        The query and key rows of a fused projection that holds 4 heads of width 16 one by one:

        >>> import torch
        >>> both = (slice(None), slice(0, 2))
        >>> heads = Part("qkv.weight", view=(4, 3, 16, 64), index=both, units=(4,))
        >>> heads.entries(torch.zeros(192, 64)).shape, heads.n_units(torch.zeros(192, 64))
        (torch.Size([4, 2, 16, 64]), 4)
    """

    name: str
    view: tuple[int, ...] = ()
    index: tuple[slice, ...] = ()
    units: tuple[int, ...] = ()

    def entries(self, tensor: Tensor) -> Tensor:
        """These entries of the parameter, or of a tensor of its shape, as a view."""
        if self.view:
            tensor = tensor.view(self.view)
        return tensor[self.index] if self.index else tensor

    def n_units(self, tensor: Tensor) -> int:
        """How many units there are, given the parameter or a tensor of its shape."""
        return math.prod(self.units) if self.units else self.entries(tensor).numel()

    def blocks(self, tensor: Tensor) -> Tensor:
        """These entries with each dimension as two, (units, entries in a unit), as a view."""
        entries = self.entries(tensor)
        counts = [*self.units, *(1,) * (entries.ndim - len(self.units))]
        pairs = zip(counts if self.units else entries.shape, entries.shape, strict=True)
        return entries.view([m for n, size in pairs for m in (n, size // max(1, n))])

    def write_(self, mask: Tensor, whole: Tensor) -> None:
        """Write a flat mask of the units to all of their entries in ``whole``, in place.

        Example:
            >>> import torch
            >>> whole = torch.ones(2, 4, dtype=torch.bool)
            >>> Part("weight", units=(1, 2)).write_(torch.tensor([True, False]), whole)
            >>> whole
            tensor([[ True,  True, False, False],
                    [ True,  True, False, False]])
        """
        blocks = self.blocks(whole)
        blocks.copy_(mask.reshape([n if d % 2 == 0 else 1 for d, n in enumerate(blocks.shape)]))

    def __repr__(self) -> str:
        """What was given, and nothing of what was not."""
        given = {"view": self.view, "index": self.index, "units": self.units}
        text = ", ".join([repr(self.name), *(f"{key}={v}" for key, v in given.items() if v)])
        text = text.replace("slice(None, None, None)", "slice(None)")
        return f"Part({text.replace(', None)', ')')})"


@dataclass(frozen=True, init=False, repr=False)
class Representative:
    """Units that are ranked to draw the mask: a parameter, a part of one, or parts of several.

    Single entries are ranked by their magnitude, units of several entries by the mean magnitude of
    what they have in all ``parts``.

    Args:
        parts: What is ranked: a parameter's name, which stands for all of its entries; a
            :class:`Part`; or several that make up the same units, such as the query rows and the
            key rows of heads.
        followers: Parts that live and die with the units and have no say in the ranking. A name
            stands for the first part's entries in another parameter, such as the shifts of
            BatchNorm scales.
        selector_index: Which selector of a union ``a | b`` found it, for ``scope="selector"``; only
            ``|`` sets it.

    Raises:
        TypeError: When a part is neither a name nor a :class:`Part`.
        ValueError: When there are no parts.

    Example:
        A BatchNorm scale and its shift, and the 8 filters of a convolution with their biases:

        >>> Representative("1.weight", followers=("1.bias",))
        Representative('1.weight', followers=('1.bias',))
        >>> Representative(Part("0.weight", units=(8,)), followers=("0.bias",)).members
        (Part('0.weight', units=(8,)), Part('0.bias', units=(8,)))
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
        vars(self).update(  # for the class is frozen
            parts=ranked, followers=tuple(following), selector_index=selector_index
        )

    @property
    def name(self) -> str:
        """The name of the first parameter."""
        return self.parts[0].name

    @property
    def members(self) -> tuple[Part, ...]:
        """What is ranked, then what follows."""
        return (*self.parts, *self.followers)

    def n_units(self, tensor: Tensor) -> int:
        """How many units are ranked, given the first part's parameter or a tensor of its shape."""
        return self.parts[0].n_units(tensor)

    def __repr__(self) -> str:
        """As short as it could have been written."""
        first = self.parts[0]
        parts = tuple(p.name if p == Part(p.name) else p for p in self.parts)
        text = repr(parts if len(parts) > 1 else parts[0])
        if self.followers:
            alike = (f.name if f == replace(first, name=f.name) else f for f in self.followers)
            text += f", followers={tuple(alike)}"
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


def check_selector(what: str, selector: object) -> None:
    """Raise unless it is a selector, and say how to write what was meant."""
    way = "BatchNormSelector()"
    if isinstance(selector, str):
        way = f"ParameterSelector({selector!r})"
    elif isinstance(selector, type):
        way = f"{selector.__name__}(), an object of the class"
    elif callable(selector):
        return
    raise TypeError(
        f"{what} must be a callable model -> list of Representative, such as {way}, got "
        f"{selector!r}."
    )


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
            check_selector("Each side of `|`", selector)

    def __call__(self, model: nn.Module) -> list[Representative]:
        """Both lists, one after the other."""
        first, second = list(self.first(model)), list(self.second(model))
        n_before = 1 + max((getattr(each, "selector_index", 0) for each in first), default=0)
        for i, each in enumerate(second):
            if isinstance(each, Representative):  # `select` refuses all else, and says why
                second[i] = replace(each, selector_index=each.selector_index + n_before)
        return first + second
