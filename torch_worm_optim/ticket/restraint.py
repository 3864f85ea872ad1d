"""What a step does to the entries that a mask removes: truncate them, or hold them at zero."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torch_worm_optim._binding import Binding
from torch_worm_optim._checks import warn_once, warn_user
from torch_worm_optim.distributed import is_dtensor, local_data_ptr, local_tensor
from torch_worm_optim.ticket.ticket import Ticket

Closure = Callable[[], Any]

# Optimizers that normalise a gradient by its own history, sign or spectrum, by what their class
# names have in common, since most of them live in other packages.
_NORMALISING = re.compile(
    r"Ada|Adopt|RMSprop|Rprop|LaProp|^Sign|Lamb(?!da)|LAMB|Lion|Prodigy|Sophia|Shampoo|SOAP|Muon|Kron"
    r"|NovoGrad|MADGRAD|^Mars|CAME|Yogi|AdEMAMix|Ranger|Tiger"
)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# For so many steps after pruning it is checked, which waits for the device, whether something has
# written to weights that are held at zero. Lookahead, for one, does so every five or six steps.
_STEPS_CHECKED = 20


class Restraint:
    r"""Holds back the entries that a mask removes, in every step of the base optimizer.

    The base optimizer sees ``gradient`` times their gradient, ``update`` times its update is kept,
    and the result is multiplied by ``factor``:

    .. math:: w \leftarrow f\,(w + u\,\Delta w(g\,\nabla))

    Truncated gradients, the paper's formula, are (r, 1, 1); truncated updates (1, r, 1); a pruned
    network is (0, 1, 0). A kept entry keeps its bits. Parameters are looked up once; see
    :meth:`is_current`.
    """

    def __init__(
        self,
        binding: Binding,
        ticket: Ticket,
        warned: set[str],
        *,
        gradient: float = 1.0,
        update: float = 1.0,
        factor: float = 1.0,
    ) -> None:
        self.binding, self.warned = binding, warned
        self.gradient, self.update, self.factor = gradient, update, factor
        self.n_zeroed = 0  # how often this object has set removed entries to zero
        # Tensors that are made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            found: dict[int, tuple[Tensor, Tensor]] = {}  # a parameter may have several names
            for name, mask in ticket.removed(binding.parameter):
                parameter = binding.parameter(name)
                other = found[id(parameter)][1] if id(parameter) in found else mask
                found[id(parameter)] = (parameter, mask | other)
            # Modules and parameters on the way, each of which may be replaced.
            places = [place for name in ticket.masks for place in binding.path(name)]
            unique = {(id(owner), key): (owner, key, owner[key]) for owner, key in places}
            self._places = list(unique.values())
            self._parameters = [parameter for parameter, _ in found.values()]
            self._removed = [mask for _, mask in found.values()]
            self._weights = [local_tensor(parameter) for parameter in self._parameters]
            self._pointers = [weight.data_ptr() for weight in self._weights]
            pairs = list(zip(self._weights, self._removed, strict=True))
            self._gradient_shares, self._weight_shares = (
                [torch.ones_like(weight).masked_fill_(mask, share) for weight, mask in pairs]
                if 0 < share < 1
                else []
                for share in (gradient, factor)
            )
            self._bits = [_bits(weight) for weight in self._weights]
            # All bits of a kept entry are set: an AND zeroes infinities and NaN too, and is fast.
            self._kept = [
                torch.zeros_like(bits).masked_fill_(~_like_bits(mask, weight), -1)
                for bits, (weight, mask) in zip(self._bits, pairs, strict=True)
                if 0 in (gradient, factor) or update < 1
            ]

    def is_current(self) -> bool:
        """Whether the parameters, and their memory, are still those of the model."""
        return all(owner.get(key) is value for owner, key, value in self._places) and all(
            local_data_ptr(parameter) == pointer
            for parameter, pointer in zip(self._parameters, self._pointers, strict=True)
        )

    def step(self, base_step: Callable[[Closure | None], Any], closure: Closure | None) -> Any:
        """Take a step of the base optimizer that leaves removed entries where they are to be."""
        if 0 < self.n_zeroed <= _STEPS_CHECKED:
            self._warn_if_alive()
        before = [weight.clone() for weight in self._weights] if self.update < 1 else []
        if closure is None or self.gradient == 0:  # Some optimizers use what is there before it.
            self._scale_gradients()
        loss = base_step(closure and self._scaled(closure))
        with torch.no_grad():
            for weight, old, bits, kept in zip(
                self._weights, before, self._bits, self._kept, strict=False
            ):
                if self.update:
                    old.lerp_(weight, self.update)
                bits.bitwise_and_(kept).bitwise_or_(_bits(old).bitwise_and_(~kept))
            if self._weight_shares:
                torch._foreach_mul_(self._weights, self._weight_shares)
        if self.factor == 0:
            self.zero_()
        if self.factor and all(parameter.grad is None for parameter in self._parameters):
            self._warn_of_no_gradients()
        return loss

    def _scaled(self, closure: Closure) -> Closure:
        """A closure that scales the gradients each time that it has computed them."""

        def scaled() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._scale_gradients()
            return loss

        return scaled

    @torch.no_grad()
    def _scale_gradients(self) -> None:
        """Scale the gradients of removed entries."""
        if self.gradient == 1:
            return
        dense: list[Tensor] = []
        factors: list[Tensor] = []
        for index, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            values, at = gradient, None
            if is_dtensor(gradient):
                values = gradient.to_local()  # type: ignore[attr-defined]
            elif gradient.is_sparse:
                # Scaling is linear, so values that are not yet coalesced may be scaled one by one.
                values, at = gradient._values(), tuple(gradient._indices())
            if self.gradient == 0:
                kept = self._kept[index]
                _bits(values).bitwise_and_(kept if at is None else kept[at])
            else:
                shares = self._gradient_shares[index]
                dense.append(values)
                factors.append(shares if at is None else shares[at])
        if dense:
            torch._foreach_mul_(dense, factors)

    @torch.no_grad()
    def zero_(self) -> None:
        """Set removed entries to zero, in the weights."""
        self.n_zeroed += 1
        for bits, kept in zip(self._bits, self._kept, strict=True):
            bits.bitwise_and_(kept)

    @torch.no_grad()
    def apply_(self) -> None:
        """Set removed entries to zero, in the weights and in the base optimizer's state."""
        self.zero_()
        for tensor, mask in self.held():
            tensor.masked_fill_(mask.to(tensor.device), 0)  # it may have a dtype of its own

    def held(self) -> list[tuple[Tensor, Tensor]]:
        """Weights and what the base optimizer keeps of them, with masks of what is removed."""
        return [
            (local_tensor(tensor), mask)
            for parameter, mask in zip(self._parameters, self._removed, strict=True)
            for tensor in (parameter, *self.binding.state_like(parameter))
        ]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Set removed entries to zero; if what follows fails they are what they were again."""
        alive = [
            (tensor, tensor.detach().clone())
            for tensor, removed in self.held()
            if tensor[removed.to(tensor.device)].any()
        ]
        self.apply_()
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for tensor, values in alive:
                    tensor.copy_(values)
            raise

    def _warn_if_alive(self) -> None:
        """Warn, once, if something has written to weights that are held at zero."""
        alive = [
            (weight.ne(0) & mask).any().cpu()
            for weight, mask in zip(self._weights, self._removed, strict=True)
        ]
        if alive and bool(torch.stack(alive).any()):
            warn_once(
                self.warned,
                "alive",
                "Weights that the ticket removes, zero after the last step, are not zero any more: "
                "something writes weights after this optimizer, such as an optimizer around it, "
                "an average that is swapped in, or a checkpoint that is loaded, and what is saved "
                "then is not pruned. Put WormOptimizer outermost, or call "
                "apply_ticket_(model, opt.final_mask) before saving.",
            )

    def _warn_of_no_gradients(self) -> None:
        """Warn, once, that nothing was truncated."""
        warn_once(
            self.warned,
            "no gradients",
            "No representative parameter has a gradient at step(), so nothing is truncated. "
            "Either they are all frozen (pass a `selector=` that names trained parameters), "
            "or gradients are consumed before step(), as optimizers that step in backward and "
            "sharded engines such as DeepSpeed ZeRO do, and truncation cannot reach them.",
        )


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers; a complex entry is two, along one more dimension."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.element_size()])


def _like_bits(mask: Tensor, tensor: Tensor) -> Tensor:
    """A mask of a tensor's entries that broadcasts over its integers."""
    return mask.unsqueeze(-1) if tensor.is_complex() else mask


def is_normalising(optimizer: Optimizer) -> bool:
    """Whether an optimizer takes a constant factor in a gradient out again, as Adam does."""
    return any(_NORMALISING.search(kind.__name__) for kind in type(optimizer).__mro__)


def warn_if_normalising(base_optim: Optimizer) -> None:
    """Warn that scaled gradients do nothing for long under an optimizer that normalises them."""
    if is_normalising(base_optim):
        warn_user(
            f"{type(base_optim).__name__} normalises gradients, so a gradient scaled by "
            "`truncation` is scaled back within a few thousand steps, and "
            '`truncate="gradient"` loses its effect. Pass `truncate="update"` to scale what the '
            "optimizer does instead of what it sees."
        )
