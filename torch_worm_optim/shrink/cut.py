"""Parameters and buffers made smaller, in place and so that it can be undone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from torch_worm_optim.shrink.resize import Sizes
from torch_worm_optim.shrink.scatter import Scattered, gather_, scatter_

# For each dimension of a tensor which indices stay; None where all do.
Kept = tuple["Tensor | None", ...]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def cut_tensor(tensor: Tensor, kept: Kept, groups: int = 1) -> Tensor:
    """The indices of a tensor that stay, in its memory format; `groups` are a convolution's."""
    result = tensor.detach()
    for dim, indices in reversed(list(enumerate(kept))):
        if indices is None:
            continue
        indices = indices.to(tensor.device)
        if dim == 1 and groups > 1:
            n = tensor.shape[1]
            parts = [
                part.index_select(1, indices[indices // n == group] - group * n)
                for group, part in enumerate(result.chunk(groups))
            ]
            result = torch.cat(parts)
        else:
            result = result.index_select(dim, indices)
    for dims, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == dims and tensor.is_contiguous(memory_format=memory_format):
            return result.contiguous(memory_format=memory_format)
    return result


def composed(first: Kept | None, second: Kept) -> Kept:
    """What stays of a tensor that is cut twice, in the indices that it had at first."""
    if first is None:
        return second
    return tuple(
        b if a is None else a if b is None else a[b] for a, b in zip(first, second, strict=True)
    )


class Cut:
    """What is cut out of a model, which can be undone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kept: dict[str, Kept] = {}
        self.groups = {
            f"{name}.weight": module.groups
            for name, module in model.named_modules()
            if isinstance(module, _ConvNd) and 1 < module.groups < module.in_channels
        }
        self.before = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
        self.sizes = Sizes(model)
        self._modules = [m for m in model.modules() if not isinstance(m, Scattered)]

    @property
    def scattered(self) -> list[nn.Module]:
        """The BatchNorms that write by index now, and did not at first."""
        return [module for module in self._modules if isinstance(module, Scattered)]

    def cut_(self, kept: Mapping[str, Kept]) -> None:
        """Cut parameters and buffers, and set what modules say of their sizes."""
        named = named_tensors(self.model)
        with torch.no_grad():
            for name, indices in kept.items():
                smaller = cut_tensor(named[name], indices, self.groups.get(name, 1))
                named[name].set_(smaller)  # type: ignore[call-overload]
                self.kept[name] = composed(self.kept.get(name), indices)
        self.sizes.update()

    def scatter_(self, module: nn.Module, indices: Tensor, width: int) -> None:
        """Have a BatchNorm write into a tensor of so many channels."""
        scatter_(module, indices, width)

    def undo(self) -> None:
        """Put everything back."""
        for module in self.scattered:
            gather_(module)
        named = named_tensors(self.model)
        with torch.no_grad():
            for name, tensor in self.before.items():
                if named[name].shape != tensor.shape:
                    named[name].set_(tensor)  # type: ignore[call-overload]
        self.sizes.restore()


@contextlib.contextmanager
def put_back_on_error(model: nn.Module) -> Iterator[None]:
    """Have a model be as it is now if anything goes wrong."""
    before = Cut(model)
    try:
        yield
    except BaseException:
        before.undo()
        raise
