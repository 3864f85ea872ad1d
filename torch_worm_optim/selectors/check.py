"""The default selector, and the checks of what any selector returns."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_worm_optim.distributed import check_gatherable
from torch_worm_optim.selectors.attention import QueryKeySelector
from torch_worm_optim.selectors.batchnorm import BatchNormSelector
from torch_worm_optim.selectors.representative import (
    HINT_DEFAULT,
    NothingFound,
    Part,
    Representative,
    Selector,
)


def default_selector(model: nn.Module) -> list[Representative]:
    """BatchNorm scales if there are any, else query and key weights; an error if neither."""
    for selector in (BatchNormSelector(), QueryKeySelector()):
        with suppress(NothingFound):
            return selector(model)
    kinds = {type(module).__name__ for module in model.modules()}
    frozen = ", ".join(sorted(kind for kind in kinds if "FrozenBatchNorm" in kind))
    raise ValueError(
        f"{type(model).__name__} has neither BatchNorm scales nor attention with query and key "
        "weights, so no parameters represent it by themselves. "
        + (f"Scales of {frozen} are buffers, which are not trained: use BatchNorm. " * bool(frozen))
        + f"Name some that it has:{_suggest_selectors(model)}"
    )


def _suggest_selectors(model: nn.Module) -> str:
    """A line for each selector that finds what is trained, to be typed as it stands."""
    trained = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad and not is_lazy(parameter)
    ]
    norms = {
        type(module).__name__
        for module, name, parameter in trained
        if "Norm" in type(module).__name__ and name == "weight" and parameter.ndim == 1
    }
    lines = []
    if any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) and "weight_hh" in n for m, n, _ in trained):
        lines.append('hidden-to-hidden weights: selector=ParameterSelector("*weight_hh*")')
    if norms:
        lines.append(
            f"scales of {', '.join(sorted(norms))}: "
            'selector=ParameterSelector(lambda name, p: name.endswith("weight") and p.ndim == 1)'
        )
    if any(parameter.ndim > 1 for _, _, parameter in trained):
        lines.append(
            "every matrix and filter: selector=ParameterSelector(lambda name, p: p.ndim > 1)"
        )
    else:
        lines.append('every parameter: selector=ParameterSelector("*")')
    return "".join(f"\n- {line}" for line in lines)


def select(
    selector: Selector, model: nn.Module, owned: Iterable[Tensor]
) -> tuple[list[Representative], int]:
    """What is selected and requires a gradient, checked, and how much is selected and does not."""
    if not callable(selector):
        raise TypeError(
            "`selector` must be a callable model -> list of Representative, such as "
            f"BatchNormSelector(), got {selector!r}."
        )
    representatives = list(selector(model))
    if not representatives:
        raise ValueError(
            f"The selector {selector!r} found nothing in {type(model).__name__}. {HINT_DEFAULT}"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # Shapes are looked at on tensors without data, whole where a rank holds a part.
    shapes: dict[str, Tensor] = {}
    owned_ids = {id(parameter) for parameter in owned}
    parts_of: dict[int, list[Part]] = {}
    trained: list[Representative] = []
    for representative in representatives:
        if not isinstance(representative, Representative):
            raise TypeError(
                f"A selector returns a list of Representative, got {representative!r} in it."
            )
        for part in representative.members:
            _check_name(part.name, parameters, model)
        if not any(parameters[part.name].requires_grad for part in representative.parts):
            continue
        trained.append(representative)
        for part in representative.members:
            _check_parameter(part.name, parameters, owned_ids)
            whole = parameters[part.name]
            shapes[part.name] = torch.empty_strided(whole.shape, whole.stride(), device="meta")
        _check_shapes(representative, shapes)
        for part in representative.members:
            others = parts_of.setdefault(id(parameters[part.name]), [])
            others.append(part)
            if len(others) > 1:
                _check_apart(others, shapes[part.name])
    if not trained:
        _check_rankable(representatives[0].name, parameters[representatives[0].name])
        raise ValueError(
            f"Nothing that is selected in {type(model).__name__} requires a gradient, "
            f"{representatives[0].name!r} for one, so there is nothing to search. "
            "Build WormOptimizer once they are unfrozen, or pass a `selector=` for what is trained."
        )
    return trained, len(representatives) - len(trained)


def _check_name(name: str, parameters: dict[str, nn.Parameter], model: nn.Module) -> None:
    if name not in parameters:
        close = difflib.get_close_matches(name, parameters, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " See `model.named_parameters()`."
        raise ValueError(
            f"{type(model).__name__} has no parameter {name!r}, which was selected.{hint}"
        )


def _check_parameter(name: str, parameters: dict[str, nn.Parameter], owned_ids: set[int]) -> None:
    _check_rankable(name, parameters[name])
    if parameters[name].requires_grad and id(parameters[name]) not in owned_ids:
        raise ValueError(
            f"The base optimizer does not own {name!r}, which was selected. Give it to "
            "the optimizer, or pass a `selector=` that leaves it out."
        )


def _check_shapes(representative: Representative, parameters: dict[str, Tensor]) -> None:
    for part in representative.members:
        _check_part(part, parameters[part.name])
    n_units = representative.n_units(parameters[representative.name])
    for part in representative.members:
        n_here = part.n_units(parameters[part.name])
        if n_here != n_units:
            raise ValueError(
                f"{part.name!r} of shape {tuple(parameters[part.name].shape)} has {n_here} units, "
                f"but {representative.name!r}, which it goes with, has {n_units}. State the units "
                "of each with Part(name, units=...)."
            )


def _check_part(part: Part, parameter: Tensor) -> None:
    shape = part.view or tuple(parameter.shape)
    bounds = [
        (index.start or 0, index.stop, index.step or 1) if isinstance(index, slice) else None
        for index in part.index
    ]
    fits = math.prod(shape) == parameter.numel() and len(bounds) <= len(shape)
    # Only slices give a view; and those that run over the end are cut short without a word.
    fits = fits and all(
        bound is not None
        and 0 <= bound[0] < size
        and bound[0] < (size if bound[1] is None else bound[1]) <= size
        and bound[2] > 0
        for bound, size in zip(bounds, shape, strict=False)
    )
    if not fits:
        raise ValueError(
            f"{part.name!r} has shape {tuple(parameter.shape)}, which {part} does not fit: `view` "
            "must have as many entries, and `index` one slice for each leading dimension, none of "
            "them empty or past its end."
        )
    try:
        entries = part.entries(parameter)
    except RuntimeError as error:
        raise ValueError(f"{part} only may split dimensions: {error}") from error
    if len(part.units) > entries.ndim or any(
        n < 1 or size % n for n, size in zip(part.units, entries.shape, strict=False)
    ):
        raise ValueError(
            f"The entries of {part} have shape {tuple(entries.shape)}: `units` says how many units "
            "there are along each leading dimension, which they must divide."
        )


def _check_apart(parts: list[Part], parameter: Tensor) -> None:
    """Raise if the last part has entries of one before it, perhaps under another name."""
    taken = torch.zeros(parameter.shape, dtype=torch.bool, device="cpu")
    for part in parts[:-1]:
        part.entries(taken).fill_(True)
    last = parts[-1]
    if last.entries(taken).any():
        first = next((part.name for part in parts if part.name != last.name), last.name)
        alias = f" (as {first!r} and {last.name!r}: one parameter)" if first != last.name else ""
        raise ValueError(f"{last.name!r} is selected twice{alias}. Name each entry once.")


def _check_rankable(name: str, parameter: Tensor) -> None:
    if is_lazy(parameter):
        raise RuntimeError(
            f"{name!r} has no shape yet: run one batch through the model before wrapping "
            "its optimizer."
        )
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise TypeError(
            f"{name!r} is of {parameter.dtype}: only floating and complex parameters can be ranked."
        )
    check_gatherable(name, parameter)
