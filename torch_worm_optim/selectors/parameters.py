"""Any parameters that the user names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from torch_worm_optim._checks import check_choice
from torch_worm_optim.distributed import canonical_name
from torch_worm_optim.selectors.projections import has_inputs_first
from torch_worm_optim.selectors.representative import JoinableSelector, Part, Representative

# What holds the rows that a bias is added to, also where weight norm or spectral norm make them.
_ROWS = re.compile(r"(|in_proj_)weight(|_g|_v|_orig)")
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original[01]?$")


@dataclass(frozen=True)
class ParameterSelector(JoinableSelector):
    r"""Select parameters by name or by a rule of your own, in the order of ``named_parameters()``.

    Args:
        which: A glob such as ``"encoder.*.weight"`` (``*`` crosses dots), a compiled regular
            expression that must match the whole name, or a predicate ``(name, parameter) -> bool``.
            The ``module.`` that a wrapper puts before names may be left out of a pattern, and a
            predicate never sees it.
        granularity (str, optional): ``"entry"`` ranks every entry on its own; ``"row"`` ranks the
            rows along the first dimension, such as the filters of a convolution or the neurons of
            a Linear, by their mean magnitude, and keeps or removes them whole (default:
            ``"entry"``). The bias of the rows follows them, unless it matches as well. None follows
            where the first dimension is that of inputs, as in a transposed convolution and in
            GPT-2's ``Conv1D``, nor in recurrent layers, whose gates several matrices make.

    Raises:
        TypeError: When ``which`` is none of the three.
        ValueError: When nothing matches, or a scalar has no rows.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [r.name for r in ParameterSelector("*.weight")(model)]
        ['0.weight', '2.weight']
        >>> [r.name for r in ParameterSelector(re.compile(r"2\..*"))(model)]
        ['2.weight', '2.bias']
        >>> [r.name for r in ParameterSelector(lambda name, parameter: parameter.ndim == 1)(model)]
        ['0.bias', '2.bias']
        >>> ParameterSelector("0.weight", granularity="row")(model)
        [Representative(Part('0.weight', units=(4,)), followers=('0.bias',))]
    """

    which: str | re.Pattern[str] | Callable[[str, Tensor], bool]
    granularity: str = "entry"

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        if not (isinstance(self.which, (str, re.Pattern)) or callable(self.which)):
            raise TypeError(
                "ParameterSelector takes a glob string, a compiled regular expression or a "
                f"predicate (name, parameter) -> bool, got {self.which!r}."
            )
        check_choice("granularity", self.granularity, ("entry", "row"))

    def __call__(self, model: nn.Module) -> list[Representative]:
        """The parameters of ``model`` that match."""
        matching = {n: p for n, p in model.named_parameters() if self._matches(n, p)}
        biases = _biases_of_rows(model, matching) if self.granularity == "row" else {}
        found = [
            Representative(Part(name, units=self._units(name, parameter)), biases.get(name, ()))
            for name, parameter in matching.items()
        ]
        if not found:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise ValueError(
                f"ParameterSelector({self.which!r}) matched no parameter of "
                f"{type(model).__name__}. Its parameters are named like {some}; `*` in a glob "
                "matches any characters, dots included."
            )
        return found

    def _units(self, name: str, parameter: Tensor) -> tuple[int, ...]:
        if self.granularity == "entry":
            return ()
        if parameter.ndim == 0:
            raise ValueError(
                f"{name!r} is a scalar of shape () and has no rows. Leave it out of the pattern, "
                'or pass granularity="entry".'
            )
        return (parameter.shape[0],)

    def _matches(self, name: str, parameter: Tensor) -> bool:
        bare = canonical_name(name)
        if isinstance(self.which, str):
            return fnmatchcase(bare, self.which) or fnmatchcase(name, self.which)
        if isinstance(self.which, re.Pattern):
            return bool(self.which.fullmatch(bare) or self.which.fullmatch(name))
        return bool(self.which(bare, parameter))


def _biases_of_rows(model: nn.Module, matching: Mapping[str, Tensor]) -> dict[str, str]:
    """By the name of a weight, that of the bias which its rows have, if it does not match too."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = set(matching)
    biases: dict[str, str] = {}
    for name, weight in matching.items():
        path, _, key = _PARAMETRIZED.sub(r"\1", name).rpartition(".")
        module = model.get_submodule(path)
        found = _ROWS.fullmatch(key)
        if found is None or isinstance(module, _ConvTransposeNd) or has_inputs_first(module):
            continue
        bias: Any = getattr(module, f"{found[1]}bias", None)
        follower = names.get(id(bias))
        if follower and follower not in taken and bias.shape == weight.shape[:1]:
            taken.add(follower)
            biases[name] = follower
    return biases
