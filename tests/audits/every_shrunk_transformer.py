"""Shrink a small transformer of every kind, and say what came of it.

    OMP_NUM_THREADS=1 python tests/audits/every_shrunk_transformer.py            # both libraries
    OMP_NUM_THREADS=1 python tests/audits/every_shrunk_transformer.py transformers bert llama

Of each attention layer half of the heads are set to zero, of each feed-forward block half of the
rows, at random. Outputs in evaluation and in training mode are compared before and after, and so
are what a decoder generates with its cache, and the output of a fresh model that loads what was
saved. Transformers are those of the mappings for sequence classification and for causal language
models; of timm the smallest network for every class of attention layer. Prints a line for each.
"""

from __future__ import annotations

import copy
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from every_attention import model_types, small_transformer, smallest_with_attention, tokens
from torch import Tensor, nn

from torch_worm_optim import FeedForwardSelector, QueryKeySelector, Representative
from torch_worm_optim.shrink import ShrinkReport, load_shrunk_, shrink_

_LARGEST = 150e6


class Outcome(NamedTuple):
    """What came of one network.

    Attributes:
        word: ``exact`` if all that is zero went, ``partly`` or ``stays`` if not, ``refused`` by the
            selectors, ``unbuilt`` if it does not run to begin with, or ``FAILED``.
        text: The figures, or why.
    """

    word: str
    text: str


@torch.no_grad()
def zero_units(model: nn.Module, representatives: list[Representative], seed: int = 0) -> None:
    """Set half of the units of each representative to zero, at random, what follows included."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for each in representatives:
        n_units = each.n_units(parameters[each.name])
        kept = torch.ones(n_units, dtype=torch.bool)
        kept[torch.randperm(n_units, generator=generator)[: n_units // 2]] = False
        for part in each.members:
            here = torch.ones_like(parameters[part.name])
            part.write_(kept, here)
            parameters[part.name].mul_(here)


@torch.no_grad()
def scatter_weights_(model: nn.Module) -> None:
    """Give every parameter random values, of a size at which outputs are neither 0 nor huge."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * (1 / max(parameter[0].numel(), 1)) ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.1)
        else:
            parameter.copy_(1 + noise * 0.1)


def selections(model: nn.Module) -> tuple[list[Representative], list[str]]:
    """Heads and rows, and what refused to select some."""
    found, refusals = [], []
    for selector in (QueryKeySelector(value=True, granularity="head"), FeedForwardSelector()):
        try:
            found += selector(model)
        except ValueError as error:
            refusals.append(f"{type(selector).__name__}: {error}".replace("\n", " ")[:150])
    return found, refusals


def try_one(
    model: nn.Module,
    kwargs: dict[str, Tensor],
    fresh: Callable[[], nn.Module] | None = None,
    generates: bool = False,
) -> Outcome:
    """Shrink a network, and compare."""
    if sum(parameter.numel() for parameter in model.parameters()) > _LARGEST:
        return Outcome("unbuilt", "it cannot be made small")
    scatter_weights_(model)
    found, refusals = selections(model)
    if not found:
        return Outcome("refused", "; ".join(refusals))
    zero_units(model, found)
    dense = copy.deepcopy(model)
    report = shrink_(model, (), kwargs)
    differences = {}
    for mode in ("evaluation", "training"):
        pair = dense.train(mode == "training"), model.train(mode == "training")
        differences[mode] = difference(*pair, kwargs)
        if differences[mode] > 1e-4:  # many layers blow rounding up, but not that of double
            twins = (copy.deepcopy(each).double() for each in pair)
            differences[mode] = difference(*twins, {k: _double(v) for k, v in kwargs.items()})
    dense.eval(), model.eval()
    if generates:
        settings = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
        ids = kwargs["input_ids"]
        try:
            expected = dense.generate(ids, **settings)
        except Exception as error:  # a model whose vocabulary is larger than its embedding
            refusals.append(f"it does not generate: {error!r}")
        else:
            differs = expected != model.generate(ids, **settings)
            differences["generate"] = float(differs.sum())
    if fresh is not None:
        loaded = fresh().eval()
        load_shrunk_(loaded, model.state_dict())
        differences["loaded"] = difference(model, loaded, kwargs)
    zero, left = report.channels
    text = ", ".join(
        [
            f"{zero - left} of {zero} zero rows gone",
            f"{report.parameters[0]:,} -> {report.parameters[1]:,} parameters",
            *(f"{what} {value:.1g}" for what, value in differences.items()),
            *refusals,
            *reasons(report),
        ]
    )
    if max(differences.values()) > 1e-4:
        return Outcome("FAILED", text)
    return Outcome("exact" if not left else "partly" if left < zero else "stays", text)


def reasons(report: ShrinkReport) -> list[str]:
    """Why zero rows stayed."""
    totals: Counter[str] = Counter()
    for each in report.reasons.values():
        totals.update(each)
    return [f"{n} stay: {why}" for why, n in totals.most_common()]


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, kwargs: dict[str, Tensor]) -> float:
    """The largest difference of outputs over the largest output, without dropout."""
    outputs = []
    for model in (a, b):
        for module in model.modules():
            if "drop" in type(module).__name__.lower():
                module.eval()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outputs.append(_tensor(model(**kwargs)).double())
    x, y = outputs
    return float((x - y).abs().max() / x.abs().max().clamp(min=1e-30))


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _tensor(output: Any) -> Tensor:
    """The logits, or the first tensor."""
    output = getattr(output, "logits", output)
    return output if isinstance(output, Tensor) else _tensor(next(iter(output)))


def without_dropout(config: Any) -> None:
    """Set every rate of dropout of a config to zero."""
    for name, value in list(vars(config).items()):
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict"):
            without_dropout(value)


def of_transformers(only: list[str]) -> Iterator[tuple[str, Outcome]]:
    """Every model type of both mappings."""
    for what, model_type, auto in model_types(only):

        def work(model_type: str = model_type, auto: Any = auto) -> Outcome:
            try:
                model = small_transformer(model_type, auto)
                model(input_ids=tokens(1))
            except Exception as error:  # whatever it wants that others do not
                return Outcome("unbuilt", repr(error)[:200])
            without_dropout(model.config)
            kind, config = type(model), copy.deepcopy(model.config)

            def fresh() -> nn.Module:
                return kind(config)

            generates = "CausalLM" in auto.__name__
            return try_one(fresh().eval(), {"input_ids": tokens(1)}, fresh, generates)

        yield what, _guarded(work, only)


def of_timm(only: list[str]) -> Iterator[tuple[str, Outcome]]:
    """The smallest timm model for every class of attention layer that any has."""
    import timm

    for kind, name in smallest_with_attention(only):

        def work(name: str = name) -> Outcome:
            def fresh() -> nn.Module:
                try:
                    return timm.create_model(name, drop_rate=0.0, drop_path_rate=0.0)
                except TypeError:  # it has no such rate
                    return timm.create_model(name, drop_rate=0.0)

            torch.manual_seed(0)
            model = fresh().eval()
            image = torch.randn(2, *model.default_cfg["input_size"])
            return try_one(model, {"x": image}, fresh)

        yield f"{kind} in {name}", _guarded(work, only)


def _guarded(work: Callable[[], Outcome], only: list[str]) -> Outcome:
    try:
        return work()
    except Exception as error:  # a model that cannot be built must not hide the others
        if only:
            traceback.print_exc()
        return Outcome("FAILED", f"{type(error).__name__}: {error}".replace("\n", " ")[:300])


def main() -> None:
    """Shrink all, or those that are named."""
    warnings.filterwarnings("ignore")
    library, only = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    for name, tried in (("transformers", of_transformers), ("timm", of_timm)):
        if library not in ("", name):
            continue
        words: Counter[str] = Counter()
        for what, outcome in tried(only):
            words[outcome.word] += 1
            print(f"{outcome.word:8}{what}: {outcome.text}", flush=True)
        print(f"== {name}: {dict(words)}", flush=True)


if __name__ == "__main__":
    main()
