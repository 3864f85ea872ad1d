"""Passes of a model, and what is heard of their operators."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from torch_worm_optim.shrink.labels import arguments_of, memory_of, tensors_in
from torch_worm_optim.shrink.operators import FACTORIES, VIEWS
from torch_worm_optim.shrink.resize import widths_of_inputs

# Operators that arrange entries anew. Which of them run depends on strides, which cutting changes.
_ARRANGING = re.compile(
    r"view|reshape|clone|copy|expand|permute|transpose|^t$|squeeze|alias|detach|strided|lift|empty"
)


class Pass(NamedTuple):
    """One call of a model."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    training: bool = False


class Step(NamedTuple):
    """An operator that computes, and the shapes of what it is given and returns."""

    operator: str
    numbers: tuple[float, ...]  # that a function of entries is given
    inputs: tuple[Any, ...]
    views: tuple[Any, ...] = ()  # that were made since the step before
    results: tuple[Any, ...] | None = None  # None if it raised


class Run(NamedTuple):
    """What passes return, what their operators did, and how many operations they take."""

    outputs: list[Any]  # of those in which nothing is random
    steps: list[Step]
    n_flops: int  # of the first
    used: set[int]  # ids of the parameters that an operator was given
    n_certain: int  # steps before the first whose results are as large as values tell
    is_fragile: bool  # whether rounding may change more than the last digits, as where values rank


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of each operator that runs: which it is, its arguments, and then what it returns."""

    def __init__(self, tell: Callable[[Any, Any, Any], Callable[[Any], None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tell = tell

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and tell of it."""
        finish = self.tell(func, args, kwargs or {})
        out = func(*args, **kwargs or {})
        finish(out)
        return out


def watched(model: nn.Module, passes: Sequence[Pass], tell: Any) -> Iterator[Any]:
    """What a model returns in each pass, where `tell` hears of each operator."""
    for args, kwargs, training in passes:
        with _all_put_back(model), torch.no_grad(), torch.random.fork_rng():
            # Modules forget what they keep in evaluation, as LeViT's do their biases of positions.
            model.train()
            if training:
                for layer in filter(_has_statistics, model.modules()):
                    layer.eval()
            else:
                model.eval()
            torch.manual_seed(0), random.seed(0), np.random.seed(0)
            with _Watch(tell):
                outputs = model(*args, **kwargs)
            model.eval()
        yield outputs


def _has_statistics(module: nn.Module) -> bool:
    """Whether all that training changes is statistics, for which one image is not enough."""
    # Vectors of a spectral norm may be of the layer that has it.
    is_of_torch = type(module).__module__.startswith("torch.nn.")
    has_own = bool(module._parameters or module._buffers)
    return isinstance(module, _NormBase) or (is_of_torch and has_own)


class _Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies tensors before an operator writes to their memory."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.untouched: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            self.untouched.setdefault(memory_of(tensor), []).append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Copy what is written to, and run the operator."""
        for tensor in written(func, args, kwargs or {}):
            touched = self.untouched.pop(memory_of(tensor), [])
            self.copies += [(each, each.clone()) for each in touched]
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def _all_put_back(model: nn.Module) -> Iterator[None]:
    """Put back what a pass writes to: tensors, as statistics are, numbers, and generators."""
    parameters = [each for each in model.parameters() if type(each) is nn.Parameter]
    # Operators do not say that they write statistics.
    buffers = [(each, each.clone()) for each in model.buffers() if type(each) is Tensor]
    data = [(each, each.data) for each in parameters]
    holders: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in (m for m in model.modules() if not isinstance(m, ScriptModule)):
        own = vars(module)
        holders.append((own, {k: v for k, v in own.items() if type(v) in (int, float, bool)}))
        holders.append((module._buffers, dict(module._buffers)))
    states = random.getstate(), np.random.get_state()
    copies = _Copies(parameters)
    try:
        with copies:
            yield
    finally:
        random.setstate(states[0]), np.random.set_state(states[1])
        for holder, content in holders:
            holder.update(content)
        with torch.no_grad():
            for parameter, memory in data:
                if parameter.data_ptr() != memory.data_ptr():
                    parameter.data = memory
            for tensor, values in (*buffers, *copies.copies):
                if tensor.layout != torch.strided or not torch.equal(tensor, values):
                    tensor.copy_(values)


def written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that an operator writes into."""
    given, arguments = arguments_of(func, args, kwargs), func._schema.arguments
    names = [each.name for each in arguments if each.alias_info and each.alias_info.is_write]
    return tensors_in([given.get(name) for name in names])


def record(model: nn.Module, passes: Sequence[Pass], steps: list[Step]) -> Run:
    """Take note of what operators are given and return, and count multiplications."""
    flops: list[int] = []
    used: set[int] = set()
    parameters = {id(each) for each in model.parameters()}
    n_certain: list[int] = []
    ranking: list[str] = []
    views: list[tuple[int, ...]] = []
    random_steps: list[str] = []

    def take_note(func: Any, args: Any, kwargs: Any) -> Callable[[Any], None]:
        inputs = tensors_in((args, kwargs))
        used.update(parameters.intersection(map(id, inputs)))
        if torch.Tag.nondeterministic_seeded in func.tags:
            random_steps.append(func.overloadpacket.__name__)
        is_step = computes(func) and bool(inputs)
        if is_step:
            name, numbers = func.overloadpacket.__name__, numbers_in(func, (args, kwargs))
            steps.append(Step(name, numbers, _shapes(inputs), tuple(views)))
            views.clear()

        def finish(out: Any) -> None:
            # The hooks of `FlopCounterMode` fail where a module gets a parameter as its input.
            if (count := flop_registry.get(func.overloadpacket)) is not None:
                flops.append(count(*args, **kwargs, out_val=out))
            if func.overloadpacket in VIEWS:
                views.append(tuple(out.shape))
            if is_step:
                if steps[-1].operator in ("topk", "sort") and inputs[0].is_floating_point():
                    ranking.append(steps[-1].operator)
                if _is_as_large_as_values_tell(func, inputs):
                    n_certain.append(len(steps) - 1)
                steps[-1] = steps[-1]._replace(results=_shapes(tensors_in(out)))

        return finish

    n_flops, outputs = 0, []
    with widths_of_inputs(model):
        for number, output in enumerate(watched(model, passes, take_note)):
            n_flops = n_flops if number else sum(flops)
            if not (passes[number].training and random_steps):
                outputs.append(output)
            random_steps.clear()
    n_before = min(n_certain, default=len(steps))
    return Run(outputs, steps, n_flops, used, n_before, bool(n_certain or ranking))


def numbers_in(func: Any, given: Any) -> tuple[float, ...]:
    """The numbers that a function of entries is given, which no size of a tensor should change."""
    is_pointwise = torch.Tag.pointwise in func.tags
    return tuple(x for x in tree_leaves(given) if is_pointwise and type(x) in (int, float))


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(each.shape) for each in tensors)


def _is_as_large_as_values_tell(func: Any, inputs: Sequence[Tensor]) -> bool:
    """Whether how many entries an operator returns depends on values, as of `nonzero`."""
    if func.overloadpacket.__name__ == "index":
        return any(each.dtype in (torch.bool, torch.uint8) for each in inputs[1:])
    is_marked = torch.Tag.dynamic_output_shape in func.tags
    return is_marked or func.overloadpacket.__name__ == "nms"


def computes(func: Any) -> bool:
    """Whether an operator makes other values than it is given."""
    packet = func.overloadpacket
    return packet not in FACTORIES and not _ARRANGING.search(packet.__name__)
