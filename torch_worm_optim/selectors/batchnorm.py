"""Scales of BatchNorms and InstanceNorms: the representatives of convolutional networks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import is_parametrized

from torch_worm_optim.selectors.representative import (
    JoinableSelector,
    Representative,
    nothing_found,
)


@dataclass(frozen=True)
class BatchNormSelector(JoinableSelector):
    """Select the scale of every affine BatchNorm and InstanceNorm, in the order of the modules.

    A BatchNorm scale multiplies a whole channel, so its magnitude ranks the channel: the idea of
    network slimming [1], which Early-Bird search and WORM take over. All kinds count:
    ``BatchNorm1d``, ``2d``, ``3d``, ``SyncBatchNorm`` and whatever derives from them, such as
    timm's ``BatchNormAct2d``, and ``InstanceNorm1d``, ``2d``, ``3d`` with ``affine=True``, which
    normalise each channel by itself, too. A scale shared by two layers is selected once.

    Args:
        bias (bool, optional): Whether the shift follows its scale, so that truncation and pruning
            reach both (default: True, as in the authors' published code).

    Raises:
        ValueError: When the model has no affine BatchNorm or InstanceNorm, or the scale or shift of
            one is computed from another parameter, as ``torch.nn.utils.prune`` and ``parametrize``
            make it.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> BatchNormSelector()(model)
        [Representative('1.weight', followers=('1.bias',))]

    References:
        [1] Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV
        2017, https://arxiv.org/abs/1708.06519.
    """

    bias: bool = True

    def __call__(self, model: nn.Module) -> list[Representative]:
        """The scales of ``model``."""
        # A parameter shared by two modules has one name in named_parameters(): the first.
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        shifts_of: dict[str, list[str]] = {}
        followed: set[int] = set()  # a shift shared by two layers follows the first of their scales
        for module in model.modules():
            scale = _parameter(module, "weight") if isinstance(module, _NormBase) else None
            if scale is None:
                continue
            shift = _parameter(module, "bias") if self.bias else None
            shifts = shifts_of.setdefault(names[id(scale)], [])
            if shift is not None and id(shift) not in followed:
                followed.add(id(shift))
                shifts.append(names[id(shift)])
        if not shifts_of:
            what = "BatchNormSelector found no BatchNorm or InstanceNorm layer with a scale"
            raise nothing_found(what, model)
        return [Representative(name, tuple(shifts)) for name, shifts in shifts_of.items()]


def _parameter(module: nn.Module, key: str) -> nn.Parameter | None:
    """The parameter of that name, or None where the layer has none."""
    if f"{key}_orig" in module._parameters or is_parametrized(module, key):
        raise ValueError(
            f"The `{key}` of a {type(module).__name__} is computed from another parameter, as "
            "torch.nn.utils.prune and parametrize make it, so BatchNormSelector would pass over "
            "it. Make it a parameter again with torch.nn.utils.prune.remove() or "
            "parametrize.remove_parametrizations(), or name what it is computed from (see "
            "`model.named_parameters()`) to ParameterSelector."
        )
    return module._parameters.get(key)
