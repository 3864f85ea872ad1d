"""An optimizer that is another one, as far as anything that uses an optimizer can tell.

Schedulers, gradient scalers, trainers and checkpointers check for ``torch.optim.Optimizer``, call
private hooks, copy, pickle and replace methods. All that they expect of a wrapper is in this file.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Closure = Callable[[], Any]
RECORD_KEY = "worm"
# What gives away a trainer's proxy, whose step may do nothing: Accelerate's and DeepSpeed's through
# Accelerate, Lightning's and Fabric's, DeepSpeed's own and those of mixed precision.
_SKIPPING = ("step_was_skipped", "_strategy", "overflow", "loss_scaler")

# The base optimizers that step inside of their wrappers at the moment, in this thread.
_stepping: ContextVar[tuple[Optimizer, ...]] = ContextVar("stepping", default=())


class _OncePerStep:
    """A global step hook that stays in its registry, and has run for a base on its wrapper."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def __call__(self, optimizer: Optimizer, *args: Any) -> Any:
        """Run the hook, unless a base optimizer steps inside of its wrapper."""
        if not any(optimizer is each for each in _stepping.get()):
            return self.hook(optimizer, *args)
        return None


class OptimizerWrapper(Optimizer):
    """An optimizer that shares all it has with another one. A subclass defines ``step``."""

    base_optim: Optimizer

    def __init__(self, base_optim: Optimizer) -> None:
        # Optimizer.__init__ would build a second `param_groups`. Its __setstate__, made for
        # unpickling, makes the hook dicts and patches `step` so that hooks fire. It also adds a key
        # to the defaults, which are the base's.
        known = set(base_optim.defaults)
        self.__setstate__({"base_optim": base_optim})
        for key in base_optim.defaults.keys() - known:
            del base_optim.defaults[key]
        self._reserve_record()

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
        """All but what points back at this object: hooks, and the ``step`` of an LR scheduler."""
        return {
            key: value
            for key, value in self.__dict__.items()
            if key != "step" and not key.endswith("_hooks")
        }

    def _step_base(self, closure: Closure | None, **kwargs: Any) -> Any:
        """Take one step of the base optimizer; returns what that returns."""
        # Some optimizers' step takes no closure at all.
        args = () if closure is None else (closure,)
        registries: tuple[dict[int, Any], ...] = (
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
        for registry in registries:
            for key, hook in list(registry.items()):
                if not isinstance(hook, _OncePerStep):
                    registry[key] = _OncePerStep(hook)
        token = _stepping.set((*_stepping.get(), self.base_optim))
        try:
            return self.base_optim.step(*args, **kwargs)
        finally:
            _stepping.reset(token)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        self.base_optim.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer; the representatives stay as they are."""
        self.base_optim.add_param_group(param_group)
        self._reserve_record()

    def _reserve_record(self) -> None:
        """Keep the key of what the wrapper saves in every group, see `_state`."""
        for group in self.param_groups:
            group.setdefault(RECORD_KEY, None)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, and what the wrapper has to remember beside it.

        It loads with ``torch.load(weights_only=True)``, and into the plain base optimizer too.
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


def check_wrappable(base_optim: Optimizer, is_pruned: bool = False) -> None:
    """Refuse what is no optimizer, still searches, or whose checkpoints cannot hold more."""
    kind = type(base_optim).__name__
    if hasattr(base_optim, "optimizer") and any(hasattr(base_optim, name) for name in _SKIPPING):
        raise TypeError(
            f"`base_optim` is a {kind}, whose step() does not step each time: it accumulates "
            "gradients or skips infinite ones, and the search would count every call. Wrap the "
            "optimizer first, and prepare that: opt = WormOptimizer(SGD(...), model), then "
            "accelerator.prepare(model, opt), fabric.setup(model, opt) or whatever made it."
        )
    if not isinstance(base_optim, Optimizer):
        raise TypeError(
            f"`base_optim` must be a torch.optim.Optimizer, got {kind}. Build the optimizer first: "
            "WormOptimizer(SGD(model.parameters(), lr=0.1), model)."
        )
    if isinstance(base_optim, OptimizerWrapper) and not is_pruned:
        raise TypeError(
            f"`base_optim` is a {kind} already. Wrap the optimizer inside it: opt.base_optim. For "
            "a second search over what the first one has pruned, of the same model, call prune() "
            "first; a checkpoint of both is loaded into the first one as well."
        )
    if hasattr(base_optim, "consolidate_state_dict"):
        return  # ZeroRedundancyOptimizer, which raises before all ranks have called that.
    missing = {"state", "param_groups"} - set(base_optim.state_dict())
    if missing:
        raise ValueError(
            f"The state_dict() of {kind} has no {sorted(missing)[0]!r}, as those of torch's "
            "optimizers do, so the search could not be saved with it. Wrap the optimizer inside of "
            f"it, and put it around that: {kind}(WormOptimizer(SGD(...), model))."
        )


def refuse_capture() -> None:
    """Raise while a CUDA graph is captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            "step() of WormOptimizer cannot be captured in a CUDA graph: a replay runs no Python, "
            "so it would count no steps, draw no masks and repeat the phase that was captured. "
            "Capture forward and backward, and call step() after each replay."
        )
