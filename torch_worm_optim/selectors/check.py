"""The default selector, and the checks of what any selector returns."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torch_worm_optim._checks import warn_user
from torch_worm_optim.distributed import check_gatherable, is_dtensor, local_tensor
from torch_worm_optim.selectors.attention import QueryKeySelector
from torch_worm_optim.selectors.batchnorm import BatchNormSelector
from torch_worm_optim.selectors.representative import (
    NothingFound,
    Part,
    Representative,
    Selector,
    check_selector,
    nothing_found,
)

# A representative with a larger share of zeros has not been ranked by anything yet.
_NEARLY_ALL = 0.9


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
    rules = {}
    if any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) and "weight_hh" in n for m, n, _ in trained):
        rules["hidden-to-hidden weights"] = '"*weight_hh*"'
    if norms:
        scales = f"scales of {', '.join(sorted(norms))}"
        rules[scales] = 'lambda name, p: name.endswith("weight") and p.ndim == 1'
    if any(parameter.ndim > 1 for _, _, parameter in trained):
        rules["every matrix and filter"] = "lambda name, p: p.ndim > 1"
    else:
        rules["every parameter"] = '"*"'
    return "".join(f"\n- {what}: selector=ParameterSelector({by})" for what, by in rules.items())


def selected(selector: Selector | None, model: nn.Module) -> list[Representative]:
    """What a selector, or the default one, finds in a model."""
    if selector is None:
        return default_selector(model)
    check_selector("`selector`", selector)
    return list(selector(model))


def select(
    selector: Selector | None, model: nn.Module, owned: Iterable[Tensor]
) -> tuple[list[Representative], int]:
    """What is selected and requires a gradient, checked, and how much is selected and does not."""
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "A model that torch.jit compiled cannot be searched, got a "
            f"{type(model).__name__}. Build WormOptimizer with the Python module that it was made "
            "of, and script or trace that after shrinking."
        )
    representatives = selected(selector, model)
    if not representatives:
        raise nothing_found(f"The selector {selector!r} found nothing", model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
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
        n_units: int | None = None
        for part in representative.members:
            parameter = parameters[part.name]
            _check_rankable(part.name, parameter)
            if parameter.requires_grad and id(parameter) not in owned_ids:
                raise ValueError(
                    f"The base optimizer does not own {part.name!r}, which was selected. Give it "
                    "to the optimizer, or pass a `selector=` that leaves it out."
                )
            # Shapes are looked at on tensors without data, whole where a rank holds a part.
            whole = torch.empty_strided(parameter.shape, parameter.stride(), device="meta")
            _check_fits(part, whole)
            n_here = part.n_units(whole)
            n_units = n_here if n_units is None else n_units
            if n_here != n_units:
                raise ValueError(
                    f"{part.name!r} of shape {tuple(whole.shape)} has {n_here} units, but "
                    f"{representative.name!r}, which it goes with, has {n_units}. State the units "
                    "of each with Part(name, units=...)."
                )
            others = parts_of.setdefault(id(parameter), [])
            others.append(part)
            if len(others) > 1:
                _check_apart(others, whole)
    if not trained:
        _check_rankable(representatives[0].name, parameters[representatives[0].name])
        raise ValueError(
            f"Nothing that is selected in {type(model).__name__} requires a gradient, "
            f"{representatives[0].name!r} for one, so there is nothing to search. "
            "Build WormOptimizer once they are unfrozen, or pass a `selector=` for what is trained."
        )
    return trained, len(representatives) - len(trained)


def warn_of_zeros(representatives: Sequence[Representative], model: nn.Module) -> None:
    """Warn of representatives that are nearly all zero before training has moved them."""
    names = [each.name for each in representatives if _is_zero(each, model)]
    if names:
        warn_user(
            f"{len(names)} of {len(representatives)} representatives start at zero, {names[0]!r} "
            "for one. Their entries tie, so their order decides which go, and once training moves "
            "them they are still the smallest there are: one ranking over all layers removes "
            "nearly all of them. Build the model without zero initialisation (timm's ResNets: "
            "`zero_init_last=False`; torchvision's: `zero_init_residual=False`), build "
            "WormOptimizer after some epochs of training, or pass a `selector=` that leaves them "
            "out."
        )


def _is_zero(representative: Representative, model: nn.Module) -> bool:
    """Whether nearly all entries are zero, as far as this rank has them and they have values."""
    zeros = numel = 0
    for part in representative.parts:
        parameter = model.get_parameter(part.name)
        values = local_tensor(parameter)
        if type(values) is Tensor and not values.is_meta:
            # A rank's part of a parameter has a shape of its own, which no view fits.
            entries = values if is_dtensor(parameter) else part.entries(values)
            zeros += int((entries == 0).sum())
            numel += entries.numel()
    return zeros > _NEARLY_ALL * numel


def _check_name(name: str, parameters: dict[str, nn.Parameter], model: nn.Module) -> None:
    if name not in parameters:
        close = difflib.get_close_matches(name, parameters, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " See `model.named_parameters()`."
        kind = type(model).__name__
        raise ValueError(f"{kind} has no parameter {name!r}, which was selected.{hint}")


def _check_fits(part: Part, parameter: Tensor) -> None:
    shape = part.view or tuple(parameter.shape)
    fits = math.prod(shape) == parameter.numel() and len(part.index) <= len(shape)
    if not (fits and all(map(_is_inside, part.index, shape))):
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


def _is_inside(index: object, size: int) -> bool:
    """Whether it gives a view, as slices do, of one entry or more, and is not cut short."""
    if not isinstance(index, slice):
        return False
    start, stop = index.start or 0, size if index.stop is None else index.stop
    return 0 <= start < stop <= size and (index.step or 1) > 0


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
