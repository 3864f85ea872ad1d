"""Shrink a network under every optimizer of torch, timm and pytorch_optimizer, and train on.

    PYTHONPATH=tests python tests/audits/every_shrunk_optimizer.py
    PYTHONPATH=tests python tests/audits/every_shrunk_optimizer.py po.aggmo po.soap

A small network is pruned, shrunk, and trained for twenty more steps in double precision, and so is
a twin that is only pruned. What the shrunk network's parameters are then is compared with what is
left of the twin's, over the largest entry. A dead filter of the twin has no effect but a size,
which optimizers that take norms see: the twin is run again with what was cut set to zero.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import every_optimizer
import torch
from every_optimizer import UnavailableError
from torch import nn
from torch.optim import Optimizer
from training import loss_of, small_cnn

from torch_worm_optim import WormOptimizer
from torch_worm_optim.shrink import cut_tensor

STEPS_BEFORE, STEPS_AFTER = 20, 20
SEARCH: dict[str, Any] = {
    "sample_every": 2,
    "window": 2,
    "stopping_point": 1.0,
    "truncate": "update",
    "scope": "layer",
}
LIMIT = 1e-9  # of double precision; optimizers that compute in single precision differ by more

# Those that differentiate the gradients once more.
SECOND_ORDER = ("timm.adahessian", "po.adahessian", "po.sophiah")
# Those whose step() needs a closure.
WITH_CLOSURE = ("torch.LBFGS", "po.lbfgs", "po.alig", "po.bsam", "SAM", "EmoNavi")
# Those that pytorch_optimizer does not name, and wrap another optimizer.
WRAPPERS = ("SAM", "WSAM", "FriendlySAM", "TRAC", "OrthoGrad")
# The same, but a WormOptimizer cannot wrap them: they are put around one.
AROUND = ("Lookahead", "ScheduleFreeWrapper")
# Those that take matrices only; AdamW trains the rest.
FOR_MATRICES = ("torch.Muon", "po.spectralsphere", "po.lorarite")


def names() -> list[str]:
    """All optimizers that are tried."""
    found = [name for name in every_optimizer.torch_names() if " " not in name]
    if every_optimizer.timm_names():
        found += [*every_optimizer.timm_names(), "timm.lookahead_adam", "timm.lookahead_kron"]
    try:
        import pytorch_optimizer
    except ImportError:
        return found
    found += [f"po.{name}" for name in pytorch_optimizer.get_supported_optimizers()]
    return found + [
        f"po.{name}({base})" for name in WRAPPERS + AROUND for base in ("AdamW", "AdaFactor")
    ]


def build(name: str, model: nn.Module, parameters: list[nn.Parameter]) -> Optimizer:
    """The optimizer of that name."""
    package, _, kind = name.partition(".")
    if package == "torch":
        return getattr(torch.optim, kind)(parameters, lr=0.01)
    if package == "timm":
        return every_optimizer.optimizer_for(name, model)
    import pytorch_optimizer

    if "(" in kind:
        kind, base = kind.rstrip(")").split("(")
        wrapper, inner = getattr(pytorch_optimizer, kind), getattr(pytorch_optimizer, base)
        if kind == "WSAM":
            return wrapper(model, parameters, inner, lr=0.01)
        if "SAM" in kind:
            return wrapper(parameters, inner, lr=0.01)
        base_optim = inner(parameters, lr=0.01)
        return base_optim if kind in AROUND else wrapper(base_optim)
    if kind == "alig":
        return pytorch_optimizer.AliG(parameters, max_lr=0.01)
    if kind == "bsam":
        return pytorch_optimizer.BSAM(parameters, num_data=64, lr=0.01)
    if kind == "ranger21":
        return pytorch_optimizer.Ranger21(parameters, num_iterations=100, lr=0.01)
    if name in FOR_MATRICES:
        return pytorch_optimizer.load_optimizer(kind)(parameters, lr=0.01)
    created = pytorch_optimizer.create_optimizer(model, kind, lr=0.01)
    if hasattr(created, "train"):
        created.train()
    return created


class Bag(nn.Embedding):
    """A sparse table; what it has for pixels, as whole numbers below 20, is averaged."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """One row for each image."""
        return super().forward((images.flatten(1) * 4 + 10).long().clamp(0, 19)).mean(1)


Training = tuple[nn.Module, WormOptimizer, list[Optimizer], list[Optimizer]]


def start(name: str, dtype: torch.dtype) -> Training:
    """A network, its wrapped optimizer, another for other parameters, and what is to be stepped."""
    torch.manual_seed(0)
    if name == "torch.SparseAdam":  # takes sparse gradients only
        layers = (Bag(20, 8, sparse=True), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        model: nn.Module = nn.Sequential(*layers).to(dtype)
        special = [model[0].weight]
    else:
        model = small_cnn(dtype)
        special = [p for p in model.parameters() if name in FOR_MATRICES and p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not other for other in special)]
    if special:
        others = [build(name, model, special)]
        base: Optimizer = torch.optim.AdamW(rest, lr=0.01)
    else:
        others, base = [], build(name, model, rest)
    for layer in model:  # Those that step by the sign would leave equal scales equal.
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    opt = WormOptimizer(base, model, **SEARCH)
    outermost: Optimizer = opt
    around = name.removeprefix("po.").partition("(")[0]
    if around in AROUND:
        import pytorch_optimizer

        outermost = getattr(pytorch_optimizer, around)(opt)
        if hasattr(outermost, "train"):
            outermost.train()
    return model, opt, others, [outermost, *others]


def take_steps(name: str, model: nn.Module, optimizers: list[Optimizer], steps: range) -> None:
    """Train; a function of the steps, random numbers included."""
    for step in steps:
        torch.default_generator.manual_seed(step)

        def closure(step: int = step) -> torch.Tensor:
            for each in optimizers:
                each.zero_grad()
            loss = loss_of(model, step)
            if name != "po.alig" or torch.is_grad_enabled():
                loss.backward(create_graph=name in SECOND_ORDER)
            return loss

        for each in optimizers:
            if any(kind in name for kind in WITH_CLOSURE):
                if "SAM" in name or name in ("po.bsam", "po.alig"):
                    closure()
                each.step(closure)
            else:
                if each is optimizers[0]:
                    closure()
                each.step()


def pruned(name: str, dtype: torch.dtype) -> Training:
    """A network that is pruned and was trained on, the same at every call."""
    model, opt, others, stepped = start(name, dtype)
    take_steps(name, model, stepped, range(STEPS_BEFORE - 2))
    opt.prune(force=True)  # a few move nothing here, so that no second mask is drawn
    take_steps(name, model, stepped, range(STEPS_BEFORE - 2, STEPS_BEFORE))
    opt.prune()  # an optimizer around a WormOptimizer may bring removed entries back
    return model, opt, others, stepped


def clear_(model: nn.Module, optimizers: list[Optimizer], kept: dict[str, Any]) -> None:
    """Set what another network has lost to zero, in a dense one and in its optimizers' state."""
    for name, dims in kept.items():
        tensor = model.state_dict(keep_vars=True)[name]
        stays = torch.ones_like(tensor)
        for dim, indices in enumerate(dims):
            if indices is not None:
                cut = torch.ones(tensor.shape[dim], dtype=torch.bool)
                cut[indices] = False
                stays.index_fill_(dim, cut.nonzero()[:, 0], 0.0)
        states = [each.state[tensor].values() for each in optimizers if tensor in each.state]
        for value in (tensor.detach(), *(value for state in states for value in state)):
            if isinstance(value, torch.Tensor) and value.shape == tensor.shape:
                value.mul_(stays.to(value.dtype))


def difference(model: nn.Module, twin: nn.Module, kept: dict[str, Any]) -> float:
    """The largest difference of what two networks share, over the largest entry."""
    worst = 0.0
    for name, parameter in model.named_parameters():
        expected = twin.get_parameter(name).detach()
        if name in kept:
            expected = cut_tensor(expected, kept[name])
        scale = max(float(expected.abs().max()), 1e-30)
        gap = float((parameter.detach() - expected).abs().max()) / scale
        worst = max(worst, gap if gap == gap else float("inf"))
    return worst


def judge(name: str) -> tuple[str, str]:
    """The outcome of one optimizer: its class, and a text."""
    dtype, after = torch.double, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)
    for dtype in (torch.double, torch.float):
        try:
            twin, _, _, twin_stepped = pruned(name, dtype)
            take_steps(name, twin, twin_stepped, after)
            break
        except UnavailableError as reason:
            return "not built here", str(reason)
        except Exception as error:  # as plain training might fail, too
            problem = f"{type(error).__name__}: {str(error)[:90]}"
    else:
        return "not trained when pruned either", problem
    single = " (single precision)" if dtype is torch.float else ""
    model, opt, others, stepped = pruned(name, dtype)
    more = {"optimizers": others} if others else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            report = opt.shrink(torch.ones(1, 1, 6, 6, dtype=dtype), **more)
        except Exception as error:
            known = isinstance(error, (RuntimeError, ValueError)) and type(
                opt.base_optim
            ).__name__ in str(error)
            return "refused by name" if known else "crashed", f"{type(error).__name__}: {error}"
    said = [str(w.message) for w in caught if "afresh" in str(w.message)]
    if report.parameters[0] == report.parameters[1]:
        return "nothing was cut", ""
    try:
        take_steps(name, model, stepped, after)
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {str(error)[:90]}"
    gap = difference(model, twin, report.kept)
    if said:
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        return "started afresh", single if finite else "then not finite"
    if gap <= LIMIT:
        return "equal to the twin", f"{gap:.1e}{single}"
    twin, _, _, twin_stepped = pruned(name, dtype)
    clear_(twin, twin_stepped, report.kept)
    take_steps(name, twin, twin_stepped, after)
    cleared = difference(model, twin, report.kept)
    if cleared <= LIMIT:
        return "equal to the twin with zeros in what was cut", f"{cleared:.1e}{single}"
    return "different", f"{gap:.1e}, with zeros {cleared:.1e}{single}"


def main() -> None:
    """Print a line for each optimizer, and the counts."""
    outcomes: dict[str, list[str]] = {}
    for name in sys.argv[1:] or names():
        outcome, details = judge(name)
        outcomes.setdefault(outcome, []).append(name)
        print(f"{name:38} {outcome}: {details[:160]}", flush=True)
    for outcome, which in outcomes.items():
        print(f"\n{len(which)} {outcome}: {', '.join(which)}")


if __name__ == "__main__":
    if every_optimizer.timm_names():
        import timm.optim.kron

        timm.optim.kron.has_dynamo = False  # It would compile itself for longer than it runs.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
