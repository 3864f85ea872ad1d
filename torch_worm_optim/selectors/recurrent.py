"""Hidden-to-hidden weights: the representative parameters of recurrent networks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from torch_worm_optim._checks import check_choice
from torch_worm_optim.selectors.representative import (
    LEAVE_IT_OUT,
    JoinableSelector,
    Part,
    Representative,
)


@dataclass(frozen=True)
class RecurrentSelector(JoinableSelector):
    """Select the hidden-to-hidden weights of recurrent layers: what a state makes of the last one.

    They carry the network's memory from step to step, as queries and keys carry attention; trying
    them is the future work that the WORM paper [1] names. ``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` of
    any depth and in both directions count, and the cells ``nn.RNNCell``, ``nn.LSTMCell`` and
    ``nn.GRUCell``.

    Args:
        granularity (str, optional): ``"entry"`` ranks every weight on its own; ``"unit"`` ranks
            hidden units, each by the rows of all its gates (four in an LSTM, three in a GRU), and
            keeps or removes these together with their hidden-to-hidden biases (default:
            ``"entry"``).

    Raises:
        ValueError: When the model has no recurrent layer.

    Example:
        >>> RecurrentSelector()(nn.LSTM(3, 4))
        [Representative('weight_hh_l0')]
        >>> [unit] = RecurrentSelector(granularity="unit")(nn.LSTM(3, 4, bias=False))
        >>> unit
        Representative(Part('weight_hh_l0', view=(4, 4, 4), units=(1, 4)))

    References:
        [1] Vasudev, "The EarlyBird Gets the WORM", PMLR 262, 2024,
        https://arxiv.org/abs/2406.11872.
    """

    granularity: str = "entry"

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        check_choice("granularity", self.granularity, ("entry", "unit"))

    def __call__(self, model: nn.Module) -> list[Representative]:
        """The hidden-to-hidden weights of ``model``."""
        found: dict[int, Representative] = {}  # a weight that two layers share is selected once
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for path, module in model.named_modules():
            if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
                continue
            for name, weight in module.named_parameters(path, recurse=False):
                bias = name.replace("weight_hh", "bias_hh")
                if "weight_hh" in name and id(weight) not in found:
                    found[id(weight)] = self._representative(
                        name, weight, module.hidden_size, bias if bias in parameters else None
                    )
        if not found:
            raise ValueError(
                f"RecurrentSelector found no recurrent layer in {type(model).__name__}. "
                f"{LEAVE_IT_OUT}"
            )
        return list(found.values())

    def _representative(
        self, name: str, weight: Tensor, hidden_size: int, bias: str | None
    ) -> Representative:
        if self.granularity == "entry":
            return Representative(name)
        n_gates, units = weight.shape[0] // hidden_size, (1, hidden_size)
        follower = bias and Part(bias, view=(n_gates, hidden_size), units=units)
        return Representative(
            Part(name, view=(n_gates, hidden_size, weight.shape[1]), units=units),
            followers=(follower,) if follower else (),
        )
