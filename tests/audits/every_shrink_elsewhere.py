"""Shrink networks that the package was not written for, and say what came of each.

    OMP_NUM_THREADS=1 python tests/audits/every_shrink_elsewhere.py --out runs/elsewhere.jsonl
    OMP_NUM_THREADS=1 python tests/audits/every_shrink_elsewhere.py --only 'hand/*norm*'

The networks are the families of torchvision, small ones with one feature each
(``elsewhere_by_hand.py``), and those of other libraries as far as they are installed
(``elsewhere_libraries.py``). Half of the channels of each BatchNorm and affine InstanceNorm are
removed by a ticket; where a network has neither, half of the rows of its convolutions and linear
layers, but for the last, with their biases. Then it is shrunk. What it computes in evaluation and
in training mode is compared with the network that was only pruned, and so are three steps of
training, and a fresh network that loads what was saved. After a refusal everything must be as it
was. Prints a line for each network and a table, and writes a line of JSON for each.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import signal
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from elsewhere_by_hand import by_hand
from elsewhere_libraries import of_libraries, of_torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

import torch_worm_optim
from torch_worm_optim import Part, Representative, ShrinkReport, WormOptimizer, load_shrunk_

OUTCOMES = (
    "exact, all gone",
    "exact, some stay",
    "pinned whole",  # zero channels were seen, and none went
    "nothing recognised",  # none was seen
    "refused",  # an error of the package's own, and all is as it was
    "no selector",
    "crash",  # an error from elsewhere
    "problem",  # something is wrong afterwards
    "not judged",
)
_PACKAGE = str(Path(torch_worm_optim.__file__).parent)
_CLOSE = {torch.float64: 1e-8, torch.float32: 1e-3}


class OutOfTime(BaseException):
    """The time of a network is over; no Exception, which the package would take for its own."""


class SettledError(Exception):
    """The outcome of a network, and why."""


@dataclass
class Row:
    """What came of one network.

    Attributes:
        name: Group and name.
        outcome: One of ``OUTCOMES``.
        why: The error, or what is wrong.
        zero: Channels that the ticket removes.
        gone: Those of them that went.
        more: Channels that went although the ticket keeps them.
        parameters: Before and after.
        reasons: Why zero channels stay, the most frequent first.
        differences: Of outputs and losses, over the largest.
        notes: What could not be compared, and why.
        seconds: Of the processor.
        trace: Where an error was raised.
    """

    name: str
    outcome: str = ""
    why: str = ""
    zero: int = 0
    gone: int = 0
    more: int = 0
    parameters: tuple[int, int] = (0, 0)
    reasons: dict[str, int] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    trace: str = ""

    def compare(self, what: str, a: list[Tensor], b: list[Tensor], limit: float) -> None:
        """Note how much two results differ, and settle the outcome if that is too much."""
        self.differences[what] = worst = difference(a, b)
        if not any(each.numel() for each in a) or any(each.isnan().any() for each in a):
            self.notes.append(f"{what} has no entries, or some that are no number")
        if worst > limit:
            raise SettledError("problem", f"{what} differs by {worst:.1g}")

    def __str__(self) -> str:
        """One line."""
        parts = [self.why] if self.why else []
        if self.zero:
            more = f" and {self.more} that it keeps" if self.more else ""
            parts.append(f"{self.gone} of {self.zero} gone{more}")
        parts += [f"{n} stay: {why}" for why, n in list(self.reasons.items())[:3]]
        return f"{self.outcome:20}{self.name}: {'; '.join([*parts, *self.notes])}"


def selected(model: nn.Module) -> list[Representative]:
    """Channels of norms, or rows of layers, each with what has to follow."""
    # A parameter that two modules share has the first of its names.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms, layers = {}, {}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    for module in model.modules():
        own = {key: names[id(p)] for key, p in module._parameters.items() if id(p) in names}
        if "weight" not in own:
            continue
        follower = [own["bias"]] if "bias" in own else []
        if isinstance(module, (_BatchNorm, _InstanceNorm)):
            norms[own["weight"]] = Representative(own["weight"], follower)
        elif isinstance(module, kinds) or type(module).__name__ == "Linear":  # of a library's own
            rows = Part(own["weight"], units=(module.weight.shape[0],))
            layers[own["weight"]] = Representative(rows, follower)
    return list(norms.values()) or list(layers.values())[:-1]


@torch.no_grad()
def scatter_values_(model: nn.Module) -> None:
    """Give norms scales, shifts and statistics of their own, but leave scales that begin at 0."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if not isinstance(module, (_BatchNorm, _InstanceNorm)):
            continue
        if isinstance(module.weight, Tensor) and module.weight.any():
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
        if isinstance(module.running_mean, Tensor):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


def pruned(model: nn.Module) -> WormOptimizer:
    """The model with a ticket applied, as a user would do it."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    settings: dict[str, Any] = {"sample_every": None, "window": 2, "scope": "layer"}
    opt = WormOptimizer(sgd, model, selected, stopping_point=1.0, **settings)
    opt.sample()
    ranked = opt.candidate_mask or {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ranked:
                parameter.mul_(0.9)
    opt.sample()
    opt.prune()
    return opt


def tensors_of(output: Any, depth: int = 0) -> list[Tensor]:
    """The tensors in whatever a model returns."""
    if isinstance(output, Tensor):
        return [output.to_dense() if output.layout != torch.strided else output]
    if isinstance(output, dict):
        return [each for value in output.values() for each in tensors_of(value, depth)]
    if isinstance(output, (list, tuple)):
        return [each for value in output for each in tensors_of(value, depth)]
    if hasattr(output, "__array__"):
        return [torch.as_tensor(output)]
    if hasattr(output, "__dict__") and not isinstance(output, nn.Module) and depth < 3:
        return tensors_of(vars(output), depth + 1)
    return []


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """A batch with floating-point numbers of another precision."""
    if isinstance(batch, dict):
        return {key: cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(cast(value, dtype) for value in batch)
    is_real = isinstance(batch, Tensor) and batch.is_floating_point()
    return batch.to(dtype) if is_real else batch


def outputs(model: nn.Module, batch: Any, train: bool, seed: int = 0) -> list[Tensor]:
    """What a model computes, without dropout, with its buffers put back."""
    was = model.training
    set_mode(model, train)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(seed)
    try:
        with torch.no_grad(), without_dropout():
            return [each.clone() for each in tensors_of(model(*batch))]
    finally:
        set_mode(model, was)
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.layout == torch.strided:
                buffer.data.copy_(buffers[name])


def without_dropout() -> contextlib.AbstractContextManager[Any]:
    """No dropout by functions either, whose random numbers depend on sizes."""
    names = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout")
    return mock.patch.multiple(F, **dict.fromkeys(names, lambda x, *_, **__: x))


def set_mode(model: nn.Module, train: bool) -> None:
    """Training or evaluation, without dropout."""
    model.train(train)
    for module in model.modules():
        if "drop" in type(module).__name__.lower():
            module.eval()


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference over the largest entry."""
    worst = 0.0 if len(a) == len(b) and a else float("inf")
    for x, y in zip(a, b, strict=False):
        if x.shape != y.shape:
            return float("inf")
        x, y = x.detach().to_dense().double(), y.detach().to_dense().double()
        if not torch.equal(x.isnan(), y.isnan()):
            return float("inf")
        x, y = x.nan_to_num(), y.nan_to_num()
        if x.numel():
            worst = max(worst, float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)))
    return worst


def losses(model: nn.Module, opt: WormOptimizer, batch: Any, n_steps: int = 3) -> list[Tensor]:
    """The loss at some steps of training."""
    set_mode(model, True)
    torch.manual_seed(0)
    found = []
    for _ in range(n_steps):
        opt.zero_grad()
        with without_dropout():
            parts = [each for each in tensors_of(model(*batch)) if each.requires_grad]
        loss = sum(((each - 0.1).square().mean() for each in parts), torch.zeros(()))
        loss.backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)
        opt.step()
        found.append(loss.detach())
    return found


def saved(model: nn.Module) -> dict[str, Any]:
    """A copy of its ``state_dict``, with the versions of modules that come with it."""
    state = model.state_dict()
    for key, value in state.items():
        state[key] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    return state


def state_of(model: nn.Module) -> dict[str, Any]:
    """What must be as it was after a refusal: entries, attributes and modes."""
    state = dict(saved(model))
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (int, float, str, tuple, torch.Size, type(None))):
                state[f"{path}: {key}"] = copy.copy(value)
    return state


def differs(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first entry that is not what it was."""
    for key in before.keys() | after.keys():
        a, b = before.get(key), after.get(key)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape or not torch.equal(a.to_dense(), b.to_dense()):
                return key
        elif type(a) is not type(b) or (not isinstance(a, tuple) and a != b and a == a):
            return key
    return ""


def is_its_own(error: BaseException) -> bool:
    """Whether the package itself raised it, on purpose."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = (last.line or "").startswith("raise ")
    return last.filename.startswith(_PACKAGE) and (raised or "raise" in (last.line or ""))


def short(error: BaseException, length: int = 260) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:length]


@contextlib.contextmanager
def settles(outcome: str, what: str = "") -> Iterator[None]:
    """Any error in here settles the outcome."""
    try:
        yield
    except Exception as error:
        raise SettledError(outcome, f"{what}{short(error)}") from error


def try_one(name: str, case: Any, scatter: bool) -> Row:
    """Shrink one network, and compare."""
    row = Row(name)
    try:
        row.outcome = judged(row, case, scatter)
    except SettledError as end:
        row.outcome, row.why = end.args
        row.trace = traceback.format_exc()
    return row


def judged(row: Row, case: Any, scatter: bool) -> str:
    """The outcome; what else is found is written to the row."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return case.build().eval()

    with settles("not judged", "does not run: "):
        torch.manual_seed(1)
        batch = case.batch()
        train_batch = case.train_batch() if case.train_batch else batch
        model = fresh()
        scatter_values_(model)
        assert outputs(model, batch, False), "no tensors in its output"
    try:
        opt = pruned(model)
    except Exception as error:
        raise SettledError("no selector" if is_its_own(error) else "crash", short(error)) from error
    ticket = opt.final_mask or {}
    # Channels that the ticket keeps, by parameter.
    keeps = {
        part.name: ticket[part.name].flatten(1).any(1) if part.units else ticket[part.name]
        for each in selected(model)
        for part in each.parts
    }
    row.zero = sum(int((~mask).sum()) for mask in keeps.values())
    dense, before = saved(model), state_of(model)
    expected = outputs(model, batch, False)
    try:
        report = opt.shrink(*batch, scatter=scatter)
    except Exception as error:
        changed = differs(before, state_of(model))
        if changed or difference(expected, outputs(model, batch, False)):
            raise SettledError("problem", f"not put back: {changed}; {short(error)}") from error
        raise SettledError("refused" if is_its_own(error) else "crash", short(error)) from error
    row.parameters = report.parameters
    row.reasons = dict(sum(map(Counter, report.reasons.values()), Counter()).most_common())
    for key, mask in keeps.items():
        [kept, *_] = report.kept.get(key) or [None]
        stays = torch.ones_like(mask) if kept is None else torch.zeros_like(mask)
        if kept is not None:
            stays[kept] = True
        row.gone += int((~mask & ~stays).sum())
        row.more += int((mask & ~stays).sum())
    small, loaded, twin = saved(model), fresh(), fresh()
    with settles("not judged", "does not load its own state: "):
        twin.load_state_dict(dense)
    with settles("problem", "load_shrunk_: "):
        load_shrunk_(loaded, small)
        its = outputs(loaded, batch, False)
    found = outputs(model, batch, False)
    row.compare("loaded", found, its, 1e-5)
    row.compare("single precision", expected, found, _CLOSE[torch.float32])
    dtype = torch.float64
    try:
        outputs(twin.double(), cast(batch, dtype), False)
        model.double()
    except Exception as error:
        dtype = torch.float32
        row.notes.append(f"compared in single precision: {short(error, 60)}")
        twin.float().load_state_dict(dense), model.float().load_state_dict(small)
    batch, train_batch = cast(batch, dtype), cast(train_batch, dtype)
    row.compare(
        "evaluation", outputs(twin, batch, False), outputs(model, batch, False), _CLOSE[dtype]
    )
    try:
        expected, other = (outputs(twin, train_batch, True, seed) for seed in (0, 1))
    except Exception as error:
        row.notes.append(f"does not run in training mode: {short(error, 90)}")
        return told(row, report)
    with settles("problem", "training mode fails: "):
        found = outputs(model, train_batch, True)
    limit = _CLOSE[dtype]
    if difference(expected, other) > 0:
        row.notes.append("random in training mode")
        limit = float("inf")

    def rounding(run: Callable[[], list[Tensor]]) -> float:
        """How much a result of the twin changes when its weights change by rounding."""
        twin.load_state_dict(dense)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1 + 10 * torch.finfo(dtype).eps * torch.randn_like(parameter))
        worst = difference(expected, run())
        row.notes.append(f"rounding explains {worst:.1g}")
        return worst

    def trained() -> list[Tensor]:
        sgd = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
        return losses(twin, WormOptimizer(sgd, twin, ticket=ticket), train_batch)

    if difference(expected, found) > limit:
        limit = max(limit, 10 * rounding(lambda: outputs(twin, train_batch, True)))
    row.compare("training", expected, found, limit)
    twin.load_state_dict(dense)
    try:
        expected = trained()
    except Exception as error:
        row.notes.append(f"cannot be trained: {short(error, 90)}")
        return told(row, report)
    with settles("problem", "training fails: "):
        found = losses(model, opt, train_batch)
    if difference(expected, found) > limit:
        limit = max(limit, 10 * rounding(trained))
    row.compare("losses", expected, found, limit)
    return told(row, report)


def told(row: Row, report: ShrinkReport) -> str:
    """The outcome of a network that was shrunk and computes what it did."""
    if row.gone:
        return "exact, all gone" if row.gone >= row.zero else "exact, some stay"
    return "pinned whole" if report.channels[0] else "nothing recognised"


def timed(name: str, case: Any, args: argparse.Namespace) -> Row:
    """One network, within its time."""

    def stop(*_: Any) -> None:
        raise OutOfTime

    start = time.process_time()
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, args.seconds)  # of the processor, whatever else it does
    try:
        row = try_one(name, case, args.scatter)
    except OutOfTime:
        row = Row(name, "not judged", f"takes longer than {args.seconds} s")
    except Exception as error:
        why = f"the audit itself fails: {short(error)}"
        row = Row(name, "not judged", why, trace=traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    row.seconds = round(time.process_time() - start, 2)
    return row


def cases() -> Iterator[tuple[str, Any]]:
    """All networks, with their groups."""
    for group, tried in (("hand", by_hand()), ("torchvision", of_torchvision())):
        yield from ((f"{group}/{name}", case) for name, case in tried.items())
    yield from of_libraries()


def print_table(rows: list[Row]) -> None:
    """Outcomes by group, and what was not exact."""
    groups = list(dict.fromkeys(row.name.partition("/")[0] for row in rows))
    print(f"\n{'':20}" + "".join(f"{each[:13]:>14}" for each in (*groups, "all")))
    for outcome in OUTCOMES:
        counts = Counter(row.name.partition("/")[0] for row in rows if row.outcome == outcome)
        numbers = [*(counts[each] for each in groups), sum(counts.values())]
        print(f"{outcome:20}" + "".join(f"{n:14}" for n in numbers))
    for outcome in OUTCOMES[2:]:
        if found := [row.name for row in rows if row.outcome == outcome]:
            print(f"{outcome} ({len(found)}): {', '.join(found)}")
    zero, gone = sum(row.zero for row in rows), sum(row.gone for row in rows)
    print(f"{gone:,} of {zero:,} removed channels gone")
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        for why, n in row.reasons.items():
            totals[why][0] += n
            totals[why][1] += 1
    for why, (n, n_networks) in sorted(totals.items(), key=lambda each: -each[1][0]):
        print(f"  {n:,} stay in {n_networks} networks: {why}")


def main() -> None:
    """Shrink all, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="globs of group/name")
    parser.add_argument("--out", type=Path, help="a file for a line of JSON for each")
    parser.add_argument("--scatter", action="store_true", help="narrow writers of residual streams")
    parser.add_argument("--seconds", type=int, default=30, help="of the processor, for each")
    parser.add_argument("--verbose", action="store_true", help="print tracebacks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("")
    rows = []
    for name, case in cases():
        if not any(fnmatch(name, each) for each in args.only):
            continue
        rows.append(timed(name, case, args))
        print(rows[-1], flush=True)
        if args.verbose:
            print(rows[-1].trace)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(asdict(rows[-1])) + "\n")
        gc.collect()
    print_table(rows)


if __name__ == "__main__":
    main()
