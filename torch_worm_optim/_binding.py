"""The current parameters of a model by name, and what the base optimizer keeps of them.

Parameters are looked up by name whenever one is needed: sharding, ``module.to()``, ``swap_tensors``
and ``convert_sync_batchnorm`` put new parameters and modules in the places of old ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torch_worm_optim.distributed import is_dtensor, placement, reshard_
from torch_worm_optim.shrink import is_preconditioning, with_inner


class Binding:
    """A model's parameters by name, and the optimizer that trains them."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, names: Iterable[str]) -> None:
        self.model, self.optimizer = model, optimizer
        # The shapes when the search begins, which surgery on the model changes.
        self._shapes = {name: model.get_parameter(name).shape for name in names}
        self._placements: dict[str, object] = {}

    def __getstate__(self) -> dict[str, Any]:
        """All but the placements, which hold process groups and are found again."""
        return {**self.__dict__, "_placements": {}}

    def path(self, name: str) -> list[tuple[dict[str, Any], str]]:
        """The dicts and keys that lead from the model through its modules to a parameter."""
        *modules, key = name.split(".")
        module, places = self.model, []
        for each in modules:
            places.append((vars(module)["_modules"], each))
            module = places[-1][0][each]
        return [*places, (vars(module)["_parameters"], key)]

    def parameter(self, name: str) -> Tensor:
        """The parameter of that name; a ``RuntimeError`` if it is gone, changed or computed."""
        parameter = self._find(name)
        shape = self._shapes.get(name)
        if parameter is None or (shape is not None and parameter.shape != shape):
            found = "is gone" if parameter is None else f"has shape {tuple(parameter.shape)}"
            was = "" if shape is None else f", and had {tuple(shape)}"
            raise RuntimeError(
                f"{name!r} {found}{was} when the search began: the model was changed under the "
                "optimizer, as by fusing a BatchNorm or replacing a layer. Build WormOptimizer "
                "after such surgery, or cut what is pruned out with `opt.shrink()`."
            )
        if type(parameter) is Tensor:
            raise RuntimeError(
                f"{name!r} is no parameter any more but computed from another, as "
                "torch.nn.utils.prune and parametrize make it, so nothing that is done to it "
                "lasts. Reparametrise before WormOptimizer is built and select what it is computed "
                "from, or make it a parameter again with torch.nn.utils.prune.remove() or "
                "parametrize.remove_parametrizations()."
            )
        return parameter

    def _find(self, name: str) -> Tensor | None:
        """What stands at a name now, sharded as it was the first time that it was a DTensor."""
        parameter = _at(self.model, name)
        if parameter is None:
            return None
        if name in self._placements and self._placements[name] != placement(parameter):
            # After a forward pass without a backward FSDP leaves a parameter there that it has
            # gathered, whole or still split by tensor parallelism.
            reshard_(self.model)
            parameter = _at(self.model, name)
        if parameter is not None and is_dtensor(parameter):
            self._placements[name] = placement(parameter)
        return parameter

    def check_trained(self, names: Iterable[str]) -> None:
        """Raise if the base optimizer does not train one of these that requires a gradient."""
        owned = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name in names:
            parameter = self.parameter(name)
            if parameter.requires_grad and id(parameter) not in owned:
                raise RuntimeError(
                    f"The base optimizer does not train {name!r}, which is ranked, as it is in the "
                    "model now. fully_shard(), load_state_dict(assign=True), to_empty() and "
                    "replaced layers make new parameters: build the optimizers after that, or put "
                    "the new parameters into `param_groups`."
                )

    def accept_shapes(self) -> None:
        """Parameters have the shapes that they are to have from now on."""
        self._shapes = {}

    def state_like(self, parameter: Tensor) -> list[Tensor]:
        """What the base optimizer, and those inside of it, keep for each entry of a parameter."""
        return [
            value
            for optimizer in with_inner([self.optimizer])
            if not is_preconditioning(optimizer)
            for value in optimizer.state.get(parameter, {}).values()
            # A subclass of Tensor, or integers, may be a code of which 0 is no zero.
            if (type(value) is Tensor or is_dtensor(value))
            and (value.is_floating_point() or value.is_complex())
            and value.shape == parameter.shape
        ]


def _at(model: nn.Module, name: str) -> Tensor | None:
    """The tensor at a dotted name, or None."""
    found: Any = model
    for key in name.split("."):
        found = getattr(found, key, None)
    return found if isinstance(found, torch.Tensor) else None
