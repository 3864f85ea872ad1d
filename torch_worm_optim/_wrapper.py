"""An optimizer that is another one, as far as anything that uses an optimizer can tell.

Schedulers, gradient scalers, trainers and checkpointers check for ``torch.optim.Optimizer``, call
private hooks, copy, pickle and replace methods. All that they expect of a wrapper is in this file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Closure = Callable[[], Any]


class OptimizerWrapper(Optimizer):
    """An optimizer that shares all it has with another one. A subclass defines ``step``.

    Args:
        base_optim (Optimizer): The optimizer to wrap; ``param_groups``, ``state`` and ``defaults``
            are its own, not copies.
    """

    base_optim: Optimizer

    def __init__(self, base_optim: Optimizer) -> None:
        # Optimizer.__init__ would build a second `param_groups`. Its __setstate__, made for
        # unpickling, makes the hook dicts and patches `step` so that hooks fire. It also adds a key
        # to the defaults, which are the base's.
        known = set(base_optim.defaults)
        self.__setstate__({"base_optim": base_optim})
        for key in base_optim.defaults.keys() - known:
            del base_optim.defaults[key]

    # Properties, since a copied reference goes stale as soon as the base loads a checkpoint; with
    # setters, since trainers assign to them.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self.base_optim.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.base_optim.param_groups = param_groups

    @property
    def state(self) -> Any:
        """The base optimizer's state, with nothing of the wrapper's in it."""
        return self.base_optim.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optim.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base_optim.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optim.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """What only the base optimizer has, such as ``train`` of schedule-free ones."""
        if hasattr(type(self), name):
            # Python asks here, too, after a property has raised AttributeError. Asked again, the
            # property raises its own message, not one about the base optimizer.
            return object.__getattribute__(self, name)
        # Private names stay private: GradScaler would hand its scale to a wrapper that shows a
        # fused base's `_step_supports_amp_scaling`, and the fused base would never see it.
        if name.startswith("_") or "base_optim" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        attribute = getattr(self.base_optim, name)
        if name in ("first_step", "second_step"):
            raise RuntimeError(
                f"{name}() of {type(self.base_optim).__name__} would go past "
                f"{type(self).__name__}.step(), which then never sees a step. Call "
                "step(closure), with a closure that clears gradients, evaluates the model and "
                "calls backward(). If its step() takes no closure, wrap its inner optimizer."
            )
        return attribute

    def __getstate__(self) -> dict[str, Any]:
        """All but what points back at this very object.

        Its hooks, as in every torch optimizer, and the ``step`` that an LR scheduler leaves on it,
        with which a copy would step the original model.
        """
        return {
            key: value
            for key, value in self.__dict__.items()
            if key != "step" and not key.endswith("_hooks")
        }

    def _step_base(self, closure: Closure | None, **kwargs: Any) -> Any:
        """Take one step of the base optimizer; returns what that returns."""
        # Some optimizers' step takes no closure at all.
        args = () if closure is None else (closure,)
        with _global_hooks_skipping(self.base_optim):
            return self.base_optim.step(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        self.base_optim.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        self.base_optim.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, and what the wrapper has to remember beside it.

        It loads with ``torch.load(weights_only=True)``, and into the plain base optimizer too.

        Returns:
            A dict with ``"state"`` and ``"param_groups"``, as every torch optimizer's.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._with_own_state(self.base_optim.state_dict())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint as if training had never stopped.

        A checkpoint of the plain base optimizer loads too: then the wrapper starts afresh. For a
        search, what its masks depend on (the representatives with their followers and parts,
        ``prune_ratio``, ``scope``, ``min_keep``, ``window``) must be as it was; thresholds,
        ``truncation`` and cadence are those of this optimizer.

        Args:
            state_dict (dict): What :meth:`state_dict` returned.

        Raises:
            TypeError: If it is not a dict.
            ValueError: If it is truncated, or saved for other parameters or other masks; optimizer
                and search are left as they were.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"`state_dict` must be a dict, got {type(state_dict).__name__}.")
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _with_own_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What to save, given what the base optimizer saves."""
        raise NotImplementedError

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Load what was saved, into the base optimizer as well."""
        raise NotImplementedError

    def _only_initialises_state(self) -> bool:
        """Whether a step taken now would only create the base optimizer's state.

        torch.distributed.checkpoint takes one with learning rate 0 and zero gradients before it
        saves or loads. A warm-up from 0 has gradients, and is a step.
        """
        rates = [group["lr"] for group in self.param_groups if "lr" in group]
        # A rate on an accelerator is the user's, and reading it would wait for the device.
        on_host = all(not isinstance(rate, Tensor) or rate.device.type == "cpu" for rate in rates)
        if not rates or not on_host or any(rates):
            return False
        gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        # All are asked: for a DTensor that is a collective call, which every rank must make.
        moved = [bool(gradient.any()) for gradient in gradients if gradient is not None]
        return not any(moved)


@contextlib.contextmanager
def _global_hooks_skipping(base: Optimizer) -> Iterator[None]:
    """Skip global step hooks for ``base``, since they already ran for this step on the wrapper.

    The hooks are exchanged, not taken out, so that they still fire for another optimizer that steps
    meanwhile, and may be removed meanwhile.
    """

    def skipping(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda optimizer, *args: None if optimizer is base else hook(optimizer, *args)

    registries: tuple[dict[int, Any], ...] = (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )
    exchanged = [
        (registry, key, hook, skipping(hook))
        for registry in registries
        for key, hook in registry.items()
    ]
    for registry, key, _, substitute in exchanged:
        registry[key] = substitute
    try:
        yield
    finally:
        for registry, key, hook, substitute in exchanged:
            if registry.get(key) is substitute:
                registry[key] = hook
