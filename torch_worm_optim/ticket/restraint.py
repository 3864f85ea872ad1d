r"""What a step does to entries that a mask removes: truncate, fade, or hold them at zero.

Four strategies, each a class whose ``step`` takes the base optimizer's step and does something
before or after it: :class:`ScaledGradients` scales what the base optimizer sees, which is the
paper's formula, :class:`ScaledUpdates` scales what the base optimizer does, :class:`Faded` undoes
it, for a fade to zero, and :class:`HeldAtZero` sets back to zero what the base optimizer moved.

What a strategy keeps between steps is derived from the newest mask and is made anew after
``clear()``, and when a parameter has another shape, dtype or device than before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

Closure = Callable[[], Any]
BaseStep = Callable[["Closure | None"], Any]

# Optimizers that normalise a gradient by its own history, sign or spectrum, by what their class
# names have in common, since most of them live in other packages.
_NORMALISING = re.compile(
    r"Ada|Adopt|RMSprop|Rprop|LaProp|^Sign|Lamb(?!da)|LAMB|Lion|Prodigy|Sophia|Shampoo|SOAP|Muon|Kron"
    r"|NovoGrad|MADGRAD|^Mars|CAME|Yogi|AdEMAMix|Ranger|Tiger"
)


class Entries(NamedTuple):
    """Those entries of one parameter that a mask applies to.

    Attributes:
        weights: The entries, a view of the parameter.
        gradient: Returns the same view of the parameter's gradient, or None where there is none.
            Gradients may appear only during a step, in a closure.
        mask: Returns the newest mask of these entries, **True = kept**, in their shape.
        state: Returns the same view of all that the base optimizer keeps in the parameter's shape.
    """

    weights: Tensor
    gradient: Callable[[], Tensor | None]
    mask: Callable[[], Tensor]
    state: Callable[[], Sequence[Tensor]] = tuple


class Strategy(Protocol):
    """Something to do around each step of the base optimizer."""

    def step(self, base_step: BaseStep, closure: Closure | None, entries: Sequence[Entries]) -> Any:
        """Run `base_step`, and change gradients before it or weights after it."""
        ...

    def clear(self) -> None:
        """Forget what was derived from the newest mask: another mask takes its place."""
        ...


class ScaledGradients:
    r"""Scale the gradients of removed entries by r before the base optimizer sees them.

    .. math::

        \nabla_t(\theta) = r\,\nabla(\theta) \text{ if } m(\theta) = 1,
        \text{ else } \nabla(\theta)

    Section 4 of the WORM paper [1], where m = 1 marks what will be *pruned*; masks in this package
    mark what is kept. The gradient of a kept entry keeps its bits. Between masks nothing is
    allocated and the device is not waited for.

    Args:
        truncation: *r*, in [0, 1].

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.tensor([2.0, 2.0])
        >>> removed = lambda: torch.tensor([True, False])
        >>> entries = [Entries(weight.detach(), lambda: weight.grad, removed)]
        >>> ScaledGradients(0.5).step(lambda closure: None, None, entries)
        >>> weight.grad
        tensor([2., 1.])

    References:
        [1] Vasudev, "The EarlyBird Gets the WORM", PMLR 262, 2024,
        https://arxiv.org/abs/2406.11872.
    """

    def __init__(self, truncation: float) -> None:
        self.truncation = truncation
        self._multipliers: list[Tensor] = []

    def step(self, base_step: BaseStep, closure: Closure | None, entries: Sequence[Entries]) -> Any:
        """Scale the gradients, in a closure each time that it has computed them, and step."""
        if not _fit(self._multipliers, entries):
            self._multipliers = [
                torch.full_like(each.weights, self.truncation).masked_fill_(each.mask(), 1)
                for each in entries
            ]
        multipliers = self._multipliers  # A closure may draw a mask, which is for later steps.

        def scale() -> None:
            scale_gradients_([each.gradient() for each in entries], multipliers)

        if closure is None:
            scale()
            return base_step(None)

        return base_step(_followed_by(closure, scale))

    def clear(self) -> None:
        """Forget the multipliers."""
        self._multipliers = []


class ScaledUpdates:
    r"""Scale what the base optimizer does to removed entries by r.

    .. math:: w \leftarrow w_\mathrm{old} + r\,(w_\mathrm{new} - w_\mathrm{old})

    Unlike a scaled gradient this holds under every optimizer, its momentum, second moments and
    weight decay included. A kept entry keeps the bits that the optimizer gave it.

    Args:
        truncation: *r*, in [0, 1].

    Example:
        >>> weight = torch.tensor([1.0, 1.0])
        >>> entries = [Entries(weight, lambda: None, lambda: torch.tensor([True, False]))]
        >>> ScaledUpdates(0.25).step(lambda closure: weight.add_(1), None, entries)
        tensor([2.0000, 1.2500])
    """

    def __init__(self, truncation: float) -> None:
        self.truncation = truncation
        self.masks: list[Tensor] = []
        self._before: list[Tensor] = []

    def step(self, base_step: BaseStep, closure: Closure | None, entries: Sequence[Entries]) -> Any:
        """Step, and go back by 1 - r of the way."""
        weights = [each.weights for each in entries]
        if not _fit(self._before, entries):
            self.masks = [each.mask().to(each.weights.device) for each in entries]
            self._before = [torch.empty_like(each) for each in weights]
        before, masks = self._before, self.masks  # as they are now, whatever a closure does
        with torch.no_grad():
            torch._foreach_copy_(before, weights)
        loss = base_step(closure)
        scale_updates_(weights, before, masks, self.truncation)
        return loss

    def clear(self) -> None:
        """Forget the masks, and the memory that old weights are kept in during a step."""
        self.masks, self._before = [], []


class Faded:
    """Keep removed entries from the base optimizer, and take them nearer to zero after each step.

    The base optimizer sees gradients of zero for them, and what its momentum and weight decay do to
    them all the same is undone. So nothing but :meth:`apply_` moves them.

    Example:
        >>> weight = torch.tensor([1.0, 1.0])
        >>> entries = [Entries(weight, lambda: None, lambda: torch.tensor([True, False]))]
        >>> faded = Faded()
        >>> _ = faded.step(lambda closure: weight.add_(1), None, entries)
        >>> faded.apply_(entries, 0.75)
        >>> weight
        tensor([2.0000, 0.7500])
    """

    def __init__(self) -> None:
        self._gradients, self._updates = ScaledGradients(0.0), ScaledUpdates(0.0)

    def step(self, base_step: BaseStep, closure: Closure | None, entries: Sequence[Entries]) -> Any:
        """Step, and leave removed entries as they are."""

        def unseeing_step(closure: Closure | None) -> Any:
            return self._gradients.step(base_step, closure, entries)

        return self._updates.step(unseeing_step, closure, entries)

    @torch.no_grad()
    def apply_(self, entries: Sequence[Entries], share: float) -> None:
        """Leave this share of removed entries after a step, in place."""
        for each, mask in zip(entries, self._updates.masks, strict=True):
            torch.where(mask, each.weights, each.weights * share, out=each.weights)

    def clear(self) -> None:
        """Forget the masks, the multipliers, and the memory for old weights."""
        self._gradients.clear()
        self._updates.clear()


class HeldAtZero:
    """Set removed entries back to zero after each step, whatever momentum and decay did to them.

    The base optimizer sees gradients of zero for them. With its state set to zero as well, once, a
    second copy of the weights that it may keep holds the ticket too.

    Example:
        >>> weight = torch.tensor([1.0, 1.0])
        >>> entries = [Entries(weight, lambda: None, lambda: torch.tensor([True, False]))]
        >>> HeldAtZero().step(lambda closure: weight.add_(1), None, entries)
        tensor([2., 0.])
    """

    def __init__(self) -> None:
        self.n_held = 0  # how often entries were set to zero since the mask was new
        self._removed: list[Tensor] = []

    def step(self, base_step: BaseStep, closure: Closure | None, entries: Sequence[Entries]) -> Any:
        """Step without removed entries' gradients, and set the entries to zero."""
        masks = self._masks(entries)

        @torch.no_grad()
        def clear_gradients() -> None:
            for each, removed in zip(entries, masks, strict=True):
                gradient = each.gradient()
                if gradient is not None and gradient.is_sparse:
                    gradient._values().masked_fill_(removed[tuple(gradient._indices())], 0)
                elif gradient is not None:
                    gradient.masked_fill_(removed, 0)

        clear_gradients()  # Some optimizers use what is there before they call a closure.
        loss = base_step(None if closure is None else _followed_by(closure, clear_gradients))
        with torch.no_grad():
            for each, removed in zip(entries, masks, strict=True):
                each.weights.masked_fill_(removed, 0)
        self.n_held += 1
        return loss

    @torch.no_grad()
    def apply_(self, entries: Sequence[Entries]) -> None:
        """Set removed entries to zero, in the weights and in the base optimizer's state."""
        self.n_held = 1
        tensors = [(each.weights, *each.state()) for each in entries]
        for group, removed in zip(tensors, self._masks(entries), strict=True):
            for tensor in group:
                tensor.masked_fill_(removed.to(tensor.device), 0)

    @torch.no_grad()
    def finds_any(self, entries: Sequence[Entries]) -> bool:
        """Whether a removed entry is not zero, which reads from the device."""
        alive = [
            (each.weights.ne(0) & removed).any().cpu()
            for each, removed in zip(entries, self._masks(entries), strict=True)
        ]
        return bool(torch.stack(alive).any()) if alive else False

    def _masks(self, entries: Sequence[Entries]) -> list[Tensor]:
        """For each which of its entries are removed."""
        if not _fit(self._removed, entries):
            self._removed = [(~each.mask()).to(each.weights.device) for each in entries]
        return self._removed

    def clear(self) -> None:
        """Forget the masks, and that anything was held."""
        self.n_held, self._removed = 0, []


@torch.no_grad()
def scale_gradients_(gradients: Sequence[Tensor | None], multipliers: Sequence[Tensor]) -> None:
    """Multiply gradients, in place.

    Args:
        gradients: Gradients, or views of some of their entries, dense or sparse; ``None`` is passed
            over.
        multipliers: For each gradient a dense tensor of its shape, on its device.

    Example:
        >>> gradient = torch.tensor([2.0, 2.0])
        >>> scale_gradients_([gradient, None], [torch.tensor([1.0, 0.5]), torch.ones(3)])
        >>> gradient
        tensor([2., 1.])
    """
    dense: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
    n_seen: Counter[int] = Counter()
    for gradient, multiplier in zip(gradients, multipliers, strict=True):
        if gradient is None:
            continue
        if gradient.is_sparse:
            # Scaling is linear, so values that are not yet coalesced may be scaled one by one.
            gradient._values().mul_(multiplier[tuple(gradient._indices())])
        else:
            # Two parts of a sharded parameter may be the same memory. One operator may handle the
            # tensors of a list at the same time, so they go into two.
            n_seen[gradient.data_ptr()] += 1
            kind = gradient.device, gradient.dtype, n_seen[gradient.data_ptr()]
            alike = dense.setdefault(kind, ([], []))
            alike[0].append(gradient)
            alike[1].append(multiplier)
    for pair in dense.values():
        torch._foreach_mul_(*pair)


@torch.no_grad()
def scale_updates_(
    weights: Sequence[Tensor],
    before: Sequence[Tensor],
    masks: Sequence[Tensor],
    truncation: float,
) -> None:
    """Undo all but a share r of what a step did to removed entries, in place.

    Args:
        weights: Parameters after the optimizer's step, or views of some of their entries.
        before: The same entries as they were before it; overwritten.
        masks: For each a bool mask of its shape, **True = kept**.
        truncation: The share *r* of the way that is left, in [0, 1].

    Example:
        >>> weight, before = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> scale_updates_([weight], [before], [torch.tensor([True, False])], 0.25)
        >>> weight
        tensor([2.0000, 1.2500])
    """
    for weight, old, mask in zip(weights, before, masks, strict=True):
        # Of an infinite update no share is left, not even a share of 0, which would be NaN.
        kept_back = old.lerp_(weight, truncation) if truncation else old
        torch.where(mask, weight, kept_back, out=weight)


def is_normalising(optimizer: Optimizer) -> bool:
    """Whether an optimizer takes a constant factor in a gradient out again.

    Adam and its kin divide a gradient by its own running size: scaled by a constant, the update is
    soon what it was before.

    Args:
        optimizer: Any optimizer; it is judged by the names of its class and the classes above it.

    Returns:
        Whether ``truncate="update"`` is needed for a truncation that lasts.

    Example:
        >>> parameter = torch.zeros(1, requires_grad=True)
        >>> is_normalising(torch.optim.AdamW([parameter]))
        True
        >>> is_normalising(torch.optim.SGD([parameter]))
        False
    """
    return any(_NORMALISING.search(kind.__name__) for kind in type(optimizer).__mro__)


def _followed_by(closure: Closure, change: Callable[[], None]) -> Closure:
    """A closure that changes the gradients each time that it has computed them."""

    def both() -> Any:
        with torch.enable_grad():
            loss = closure()
        change()
        return loss

    return both


def _fit(tensors: Sequence[Tensor], entries: Sequence[Entries]) -> bool:
    """Whether the cached tensors match the entries in number, shape, device and dtype."""
    return len(tensors) == len(entries) and all(
        tensor.shape == each.weights.shape
        and tensor.device == each.weights.device
        and tensor.dtype in (torch.bool, each.weights.dtype)
        # One that was made in inference mode cannot be written to outside of it.
        and (torch.is_inference_mode_enabled() or not tensor.is_inference())
        for tensor, each in zip(tensors, entries, strict=True)
    )
