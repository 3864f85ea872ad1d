"""BatchNorms narrower than what they write, by index, into a residual stream."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Buffers of a scattered BatchNorm: the channels that it writes, and of how many.
SCATTER, WIDTH = "scatter", "scatter_width"


class Scattered:
    """A BatchNorm that writes its channels into a wider tensor by index; the others are zero."""

    scatter: Tensor
    width: int

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, and write into zeros."""
        y: Tensor = super().forward(x)  # type: ignore[misc]
        zeros = y.new_zeros(y.shape[0], self.width, *y.shape[2:])
        return zeros.index_copy(1, self.scatter, y)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """By the class of BatchNorm that it was, since no module holds the class that it has."""
        return (_new, type(self).__bases__[1:], *super().__reduce_ex__(2)[2:])


@functools.cache
def _scattered_class(kind: Any) -> Any:
    """The class of a scattered BatchNorm of a kind."""
    return type(f"Scattered{kind.__name__}", (Scattered, kind), {})


def _new(kind: Any) -> Any:
    """A scattered BatchNorm of a kind, without attributes."""
    return object.__new__(_scattered_class(kind))


def scatter_(module: Any, indices: Tensor, width: int) -> None:
    """Have a BatchNorm write into a tensor of so many channels."""
    device = module.weight.device
    module.register_buffer(SCATTER, indices.to(device).clone())
    module.register_buffer(WIDTH, torch.tensor(width, device=device))
    module.width = width  # so that a forward need not read it back from the device
    kind: Any = type(module)
    module.__class__ = _scattered_class(kind)


def gather_(module: Any) -> None:
    """Have a scattered BatchNorm be what it was."""
    module.__class__ = type(module).__bases__[1]
    del module._buffers[SCATTER], module._buffers[WIDTH], module.width


def can_scatter(module: nn.Module) -> bool:
    """Whether it is a BatchNorm that returns zeros for a scale and shift of zero; some do not."""
    if not isinstance(module, _BatchNorm) or isinstance(module, Scattered):
        return False
    twin = copy.deepcopy(module).eval()
    with torch.no_grad():
        twin.weight.zero_(), twin.bias.zero_()
        n_spatial = next((n for n in (1, 2, 3) if f"{n}d" in str(type(module).__mro__)), 2)
        size = (1, module.num_features, *[1] * n_spatial)
        return not bool(twin(twin.weight.new_zeros(size)).any())
