"""Passes of a model, and what is heard of their operators."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torch_worm_optim.shrink.labels import tensors_in
from torch_worm_optim.shrink.operators import FACTORIES
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
    inputs: tuple[Any, ...]
    results: tuple[Any, ...] | None = None  # None if it raised


class Run(NamedTuple):
    """What passes return, what their operators did, and how many operations they take."""

    outputs: list[Any]  # of those in evaluation mode
    steps: list[Step]
    n_flops: int  # of the first
    used: set[int]  # ids of all tensors that an operator was given
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
        # Modules forget what they keep in evaluation, as LeViT's do their biases of positions.
        model.train()
        if training:
            for norm in model.modules():
                if isinstance(norm, _NormBase):  # so that one image is enough
                    norm.eval()
        else:
            model.eval()
        with torch.no_grad(), torch.random.fork_rng(), _buffers_kept(model), _Watch(tell):
            torch.manual_seed(0)
            outputs = model(*args, **kwargs)
        model.eval()
        yield outputs


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put buffers back that a pass writes to, as statistics are."""
    before = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        now = dict(model.named_buffers())
        for name, (buffer, values) in before.items():
            is_strided = buffer.layout == torch.strided
            if now.get(name) is buffer and not (is_strided and torch.equal(buffer, values)):
                buffer.copy_(values)


def record(model: nn.Module, passes: Sequence[Pass], steps: list[Step]) -> Run:
    """Take note of what operators are given and return, and count multiplications."""
    flops: list[int] = []
    used: set[int] = set()
    n_certain: list[int] = []
    ranking: list[str] = []

    def take_note(func: Any, args: Any, kwargs: Any) -> Callable[[Any], None]:
        inputs = tensors_in((args, kwargs))
        used.update(map(id, inputs))
        is_step = computes(func) and bool(inputs)
        if is_step:
            steps.append(Step(func.overloadpacket.__name__, _shapes(inputs)))

        def finish(out: Any) -> None:
            # The hooks of `FlopCounterMode` fail where a module gets a parameter as its input.
            if (count := flop_registry.get(func.overloadpacket)) is not None:
                flops.append(count(*args, **kwargs, out_val=out))
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
            outputs.append(output)
    evaluated = [out for out, each in zip(outputs, passes, strict=True) if not each.training]
    n_before = min(n_certain, default=len(steps))
    return Run(evaluated, steps, n_flops, used, n_before, bool(n_certain or ranking))


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
