"""What a selector returns, what a selector is, and how two of them join."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

# One place knows what to pass instead: the error of the default selector, which looks at the model.
LEAVE_IT_OUT = (
    "Leave out `selector=`: the default takes BatchNorm scales, or queries and keys, and where a "
    "model has neither its error lists what there is to select."
)


@dataclass(frozen=True, repr=False)
class Representative:
    """A parameter, or a part of one, whose entries are ranked to draw the mask.

    The ranked entries are ``parameter.view(view)[part]``; the defaults take the whole parameter. A
    mask of them says which entries stay (``True``) and which go. With ``units`` it is not single
    entries that are ranked but whole units, such as the filters of a convolution or the heads of an
    attention layer, by the mean magnitude of their entries: a unit stays or goes whole.

    Args:
        name: The parameter's name as in ``model.named_parameters()``.
        followers: What lives and dies with the same units and has no say in the ranking: truncation
            and pruning reach it too. A name stands for the same entries of another parameter of the
            same shape, as a BatchNorm shift follows its scale; a ``Representative`` says itself
            where its units lie, and has as many.
        view: Shape that the parameter is viewed in before ``part`` is taken; it may only split
            dimensions, so that the result is a view of any memory layout. ``()`` leaves the shape
            alone.
        part: The index of the ranked entries, one slice per leading dimension of the view. ``()``
            is all.
        units: How many units the ranked entries hold along each dimension, each a divisor of that
            dimension; dimensions left out have one. ``()`` ranks every entry on its own.
        partners: Further entries that make up the same units and are ranked with them, as the query
            rows and the key rows of a head do; each with as many units.
        group: Which of the selectors of a union found it, counted from 0; ``scope="selector"``
            ranks each group by itself.

    Example:
        The query and key rows of a fused projection of width 64, and the same for a layout that
        interleaves query, key and value per head (4 heads of 16):

        >>> import torch
        >>> weight = torch.zeros(192, 64)
        >>> Representative("blocks.0.attn.qkv.weight", part=(slice(0, 128),)).entries(weight).shape
        torch.Size([128, 64])
        >>> both = (slice(None), slice(0, 2))
        >>> heads = Representative("qkv.weight", view=(4, 3, 16, 64), part=both, units=(4,))
        >>> heads.entries(weight).shape, heads.n_units(weight)
        (torch.Size([4, 2, 16, 64]), 4)

        The 8 filters of a convolution, whose biases go with them:

        >>> Representative("weight", units=(8,), followers=(Representative("bias", units=(8,)),))
        Representative('weight', units=(8,), followers=(Representative('bias', units=(8,)),))
    """

    name: str
    followers: tuple[str | Representative, ...] = ()
    view: tuple[int, ...] = ()
    part: tuple[slice, ...] = ()
    units: tuple[int, ...] = ()
    partners: tuple[Representative, ...] = ()
    group: int = 0

    def entries(self, tensor: Tensor) -> Tensor:
        """The ranked entries of ``tensor``, as a view that shares its memory.

        Args:
            tensor: The parameter, a follower, or a gradient of either; any dtype and strides.

        Returns:
            A view of ``tensor``.
        """
        if self.view:
            tensor = tensor.view(self.view)
        return tensor[self.part] if self.part else tensor

    def n_units(self, tensor: Tensor) -> int:
        """How many units are ranked: those of ``units``, or else every entry.

        Args:
            tensor: The parameter.

        Returns:
            The number of scores that this representative has.
        """
        return math.prod(self.units) if self.units else self.entries(tensor).numel()

    @cached_property  # asked for at every step
    def ranked(self) -> tuple[Representative, ...]:
        """What makes up the units, which is this one without its followers, and its partners."""
        return (replace(self, followers=(), partners=()), *self.partners)

    @cached_property
    def reached(self) -> tuple[Representative, ...]:
        """What is ranked, then what follows."""
        alone = replace(self, followers=(), partners=())
        followers = (replace(alone, name=f) if isinstance(f, str) else f for f in self.followers)
        return (*self.ranked, *followers)

    def __repr__(self) -> str:
        """What was given, and nothing of what was not."""
        given = [repr(self.name)]
        for field in ("view", "part", "units", "partners", "followers"):
            value = getattr(self, field)
            if value:
                given.append(f"{field}={value}".replace(", None)", ")"))
        return f"Representative({', '.join(given)})"


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
        n_groups = 1 + max((getattr(each, "group", 0) for each in first), default=0)
        return [
            *first,
            *(
                replace(each, group=each.group + n_groups)
                if isinstance(each, Representative)
                else each  # `select` refuses it, and says why
                for each in second
            ),
        ]
