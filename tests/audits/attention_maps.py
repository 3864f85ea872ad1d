"""Whether a selection holds exactly what makes queries and keys, told by what attention maps do.

Without queries and keys all scores are equal, so every map is uniform over the positions that a
query may see; without the rest of the same fused matrices no map of that layer changes.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from torch_worm_optim import Part, QueryKeySelector
from torch_worm_optim.selectors import Block, attention_blocks

Maps = dict[str, list[Tensor]]

# Softmaxes inside an attention module that are no attention map: of experts, of what picks tokens.
_NO_MAP = re.compile(r"router|gate|indexer|compressor")
_BY_HAND = re.compile(r"^reformer\..*self_attention$")
# What makes scores of relative positions and of sinks: no keys, and yet scores.
_POSITIONS = re.compile(
    r"(r|r_kernel|seg_embed|r_proj|sink_proj|dt_proj|rel_pos_[hw]|pos_embed|(pos_(key_|query_|q_)?|relative_k_)proj|relative_pos\w*)(\.|$)"
)
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
_MOST_OF_A_KIND = 4


class Verdict(NamedTuple):
    """What zeroing showed.

    Attributes:
        passed: Whether the selection is exact.
        uniform: Whether all maps became uniform; if not, and passed, they became the same for any
            input: what is left of them comes from positions.
        reason: Why not, or what is special.
        n_layers: Attention layers seen.
        n_fused: Weights of which a part was selected.
    """

    passed: bool
    uniform: bool
    reason: str
    n_layers: int
    n_fused: int


class _Softmaxes(TorchDispatchMode):
    """Keeps what every softmax returns, by the module that is running."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running, self.maps = running, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        softmaxes = [torch.ops.aten._softmax.default]
        if hasattr(torch.ops.aten, "_safe_softmax"):  # from torch 2.5 on
            softmaxes.append(torch.ops.aten._safe_softmax.default)
        # Reformer divides by a sum of exponentials itself.
        by_hand = func is torch.ops.aten.exp.default and _BY_HAND.search(self.running[-1])
        if by_hand or (func in softmaxes and args[1] in (-1, result.ndim - 1)):  # over positions
            self.maps.setdefault(self.running[-1], []).append(result.detach().clone())
        return result


class _Products(TorchDispatchMode):
    """Keeps what the first matrix product after every softmax returns, by the running module."""

    def __init__(self, running: list[str]) -> None:
        super().__init__()
        self.running, self.maps, self.is_next = running, {}, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "softmax" in func.__name__:
            self.is_next = True
        elif self.is_next and func is torch.ops.aten.bmm.default:
            self.maps.setdefault(self.running[-1], []).append(result.detach().clone())
            self.is_next = False
        return result


def attention_maps(model: nn.Module, run: Callable[[], object]) -> Maps:
    """The result of every softmax that ``run`` computes, by the path of the innermost module."""
    recorded = _recorded(model, run, _Softmaxes)
    return {path: maps for path, maps in recorded.items() if not _NO_MAP.search(path.lower())}


def attended_values(model: nn.Module, run: Callable[[], object]) -> Maps:
    """Every product of maps and values that ``run`` computes, heads along the first dimension."""
    return _recorded(model, run, _Products)


@torch.no_grad()
def _recorded(model: nn.Module, run: Callable[[], object], mode: type[Any]) -> Maps:
    running = [""]
    hooks = []
    for path, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, path=path: running.append(path)))
        hooks.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        with sdpa_kernel(SDPBackend.MATH), mode(running) as recorded:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return recorded.maps


@torch.no_grad()
def make_attentive_(model: nn.Module, gain: float = 2) -> None:
    """Random weights of a size at which attention maps are far from uniform."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            fan_in = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (gain / math.sqrt(max(fan_in, 1))))
        elif name.endswith("bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        elif not parameter.any():  # a scale that is learned from 0 would hide all that it scales
            parameter.fill_(1)


@contextmanager
def zeroed(regions: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """The parameters with their marked entries at zero, and afterwards as they were."""
    before = [parameter.detach().clone() for parameter, _ in regions]
    with torch.no_grad():
        for parameter, where in regions:
            parameter.masked_fill_(where, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), old in zip(reversed(regions), reversed(before), strict=True):
                parameter.copy_(old)


def mark(block: Block) -> tuple[Tensor, Tensor]:
    """A block's parameter and which of its entries are the block's."""
    before, n_features, after = block.split_shape
    period = n_features // block.repeat
    whole = torch.zeros(block.parameter.shape, dtype=torch.bool)
    whole.view(*before, block.repeat, period, *after)[
        (slice(None),) * (len(before) + 1) + (slice(block.start, block.stop),)
    ] = True
    return block.parameter, whole


def mark_unit(part: Part, parameter: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """A parameter and which of its entries belong to one unit of a representative."""
    whole = torch.zeros(parameter.shape, dtype=torch.bool)
    entries = part.entries(whole)
    for dim, (n, index) in enumerate(
        zip(part.units, np.unravel_index(unit, part.units), strict=True)
    ):
        width = entries.shape[dim] // n
        entries = entries.narrow(dim, int(index) * width, width)
    entries.fill_(True)
    return parameter, whole


def judge(
    model: nn.Module,
    run: Callable[[], object],
    run_other: Callable[[], object],
    selector: QueryKeySelector | None = None,
) -> Verdict:
    """Zero what is selected, and what is not, and look at the maps.

    Args:
        model: Small, in ``eval()``, with weights from :func:`make_attentive_`.
        run: Runs it on some input.
        run_other: Runs it on another input of the same shape.
        selector: What to judge.
    """
    selector = selector or QueryKeySelector()
    parameters = dict(model.named_parameters())
    selected = {}
    for part in (part for each in selector(model) for part in each.parts):
        whole = selected.setdefault(part.name, torch.zeros(parameters[part.name].shape).bool())
        part.entries(whole).fill_(True)
    layers = {
        path: blocks
        for path, module in model.named_modules()
        if (blocks := attention_blocks(path, module, selector.layouts))
    }
    blocks = [block for each in layers.values() for block in each]
    inner = {
        id(parameter): (parameter, torch.ones(parameter.shape, dtype=torch.bool))
        for path in layers
        for name, parameter in model.get_submodule(path).named_parameters()
        if name.endswith("bias")
    }
    biases = list(inner.values())
    positions = [
        (parameter, torch.ones(parameter.shape, dtype=torch.bool))
        for path in layers
        for name, parameter in model.get_submodule(path).named_parameters()
        if _POSITIONS.match(name)
    ]
    of_queries = [mark(b) for b in blocks if b.label in ("q", "qk")]
    of_keys = [mark(b) for b in blocks if b.label in ("k", "kv", "qk")]
    of_both = [(parameters[name], where) for name, where in selected.items()]

    original = attention_maps(model, run)
    seen = {}
    for path in layers:
        inside = [key for key in original if key == path or key.startswith(f"{path}.")]
        # Projections may stand in a module of their own, beside the softmax.
        seen[path] = inside or [key for key in original if key == path.rpartition(".")[0]]
    n_fused = sum(not where.all() for where in selected.values())
    counts = (sum(bool(keys) for keys in seen.values()), n_fused)
    paths = {key for keys in seen.values() for key in keys}
    if not paths:
        return Verdict(False, False, "no softmax ran in any attention layer", *counts)
    flat = [p for p in paths if all(_is_uniform(m, m) for m in original[p])]
    if flat:
        return Verdict(False, False, f"maps are uniform from the start: {flat[0]}", *counts)

    uniform, notes = True, []
    for what, regions in (
        ("queries and keys", of_both + biases),
        ("queries", of_queries + biases),
        ("keys", of_keys + biases),
    ):
        looking, flat = _look(model, run, run_other, regions, original, paths)
        if looking and positions:
            notes.append("some scores come from a projection of their own, of positions or sinks")
            looking, flat = _look(model, run, run_other, regions + positions, original, paths)
        uniform = uniform and (flat or what != "queries and keys")
        if looking and what != "queries and keys":
            notes.append(f"without {what} alone, maps still look: the two are mixed")
        elif looking:
            return Verdict(False, False, f"without {what}, {looking} still looks", *counts)

    handled: set[int] = set()
    of_kind: Counter[type] = Counter()
    for path, own in layers.items():
        kind = type(model.get_submodule(path))
        of_kind[kind] += 1
        # Weights of an earlier layer change what this one sees; and layers of a kind are alike.
        if any(id(b.parameter) in handled for b in own) or of_kind[kind] > _MOST_OF_A_KIND:
            continue
        handled.update(id(b.parameter) for b in own)
        rest = [
            (b.parameter, where & ~selected.get(_name(parameters, b), torch.zeros(1).bool()))
            for b in own
            if b.label not in ("q", "k", "qk", "kv", "latent", "q_latent", "q_rank")
            for _, where in (mark(b),)
        ]
        if any(b.label.endswith("latent") for b in own):
            notes.append("a latent of more than queries or keys was left in place")
        with zeroed(rest):
            maps = attention_maps(model, run)
        for key in seen[path]:
            if not all(
                torch.allclose(a, b, rtol=0, atol=_TOLERANCE[a.dtype])
                # A layer that is used again sees what its own values made.
                for a, b in [(original[key][0], maps[key][0])]
            ):
                return Verdict(
                    False, uniform, f"{key} changed without what is not selected", *counts
                )
    # What no block describes must not be selected, nor what is no query and no key.
    for block in blocks:
        _, where = mark(block)
        chosen = selected.get(_name(parameters, block), torch.zeros(1).bool())
        is_wanted = block.label in ("q", "k", "qk", "kv", "q_rank") and not block.is_bias
        if not (chosen & where).equal(where if is_wanted else where & False):
            return Verdict(
                False, uniform, f"{block.path} of {block.label} is chosen wrongly", *counts
            )
    return Verdict(True, uniform, "; ".join(dict.fromkeys(notes)), *counts)


def _look(
    model: nn.Module,
    run: Callable[[], object],
    run_other: Callable[[], object],
    regions: list[tuple[Tensor, Tensor]],
    original: Maps,
    paths: set[str],
) -> tuple[str, bool]:
    """A layer whose maps still tell inputs apart, and whether all maps are uniform."""
    with zeroed(regions):
        maps, others = attention_maps(model, run), attention_maps(model, run_other)
    uniform = True
    for path in paths:
        for before, after, other in zip(original[path], maps[path], others[path], strict=True):
            if not _is_uniform(after, before):
                uniform = False
                if not torch.allclose(after, other, rtol=0, atol=_TOLERANCE[after.dtype]):
                    return path, False
    return "", uniform


def _name(parameters: dict[str, Tensor], block: Block) -> str:
    return next(name for name, p in parameters.items() if p is block.parameter)


def _is_uniform(attention: Tensor, original: Tensor) -> bool:
    """Whether every query gives all positions that it sees one weight; masked ones have 0."""
    seen = attention > 0
    # What was seen before and is not now would be another mask, not a flat map.
    if not (original[~seen] == 0).all():
        return False
    high = attention.amax(-1)
    low = attention.masked_fill(~seen, 2).amin(-1)
    return bool((high - low < _TOLERANCE[attention.dtype]).all())
