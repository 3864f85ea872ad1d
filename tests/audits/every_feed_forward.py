"""Judge the feed-forward selection on every architecture that transformers and timm have.

    python tests/audits/every_feed_forward.py [transformers|timm] [name ...]

Weights and biases are random. Some units of every block are set to zero. The columns that read them
are found by the inputs of all matrices: they must not influence the output any more, and must do so
if other units are zero instead. Blocks that the selector misses are found by behaviour too: any two
matrices of which the second reads, column by column, what the rows of the first make.
"""

from __future__ import annotations

import re
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from attention_maps import make_attentive_
from every_attention import SPECIAL, model_types, small_transformer, tokens
from torch import Tensor, nn

from torch_worm_optim import FeedForwardSelector, Representative
from torch_worm_optim.selectors import attention_blocks

_SECONDS = 90
_MOST_PARAMETERS = 200e6
_MOST_OF_A_KIND = 2  # of blocks that are called the same and have the same sizes
_OF_INTEREST = re.compile(
    r"^timm.*(mlp|ffn|feed_?forward|glu|ScalingBlock|mixer|TransformerBlock)", re.IGNORECASE
)
_LEAVE_OUT = re.compile(r'layouts=\{"(\w+)": \{\}\}')


SPECIAL.setdefault("rwkv", {"attention_hidden_size": 64})


class Verdict(NamedTuple):
    """What zeroing showed.

    Attributes:
        word: ``exact``, ``nothing``, ``refused`` or ``WRONG``.
        n_blocks: Blocks that were judged.
        reason: Why not; the messages with which blocks were refused, the rest of them exact.
        missed: Pairs of matrices that behave like a block and are not selected.
        leftovers: What has more than a tenth of the parameters and is no block or attention.
    """

    word: str
    n_blocks: int
    reason: str = ""
    missed: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """What mixes features by a weight, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor)
        and weight.ndim >= 2
        and "Embedding" not in type(module).__name__
        and not (isinstance(module, nn.modules.conv._ConvNd) and weight.shape[1] == 1)
    }


def _kind_of(path: str) -> str:
    """The same for what is called the same in another layer."""
    return re.sub(r"\d+", "0", path)


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


@torch.no_grad()
def inputs_of(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and what each matrix reads when it is first called: (places, features)."""
    seen: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0] if args else None
        if path in seen or not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
            return
        x = x.movedim(1, -1) if isinstance(module, nn.modules.conv._ConvNd) else x
        if x.numel():
            seen[path] = x.reshape(-1, x.shape[-1]).clone()

    hooks = [
        module.register_forward_pre_hook(lambda m, args, path=path: keep(path, m, args))
        for path, module in matrices(model).items()
    ]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()


class _Changed:
    """Tensors with some entries set to something else, and afterwards as they were."""

    def __init__(self, entries: list[Tensor], scale: float) -> None:
        self.entries, self.scale = entries, scale

    def __enter__(self) -> None:
        self.before = [each.detach().clone() for each in self.entries]
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for each in self.entries:
                noise = torch.randn(each.shape, generator=generator, dtype=each.dtype)
                each.copy_(noise * self.scale)

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for each, old in zip(self.entries, self.before, strict=True):
                each.copy_(old)


def rows(model: nn.Module, representative: Representative, units: list[int]) -> list[Tensor]:
    """The entries of these units, one view for each unit and parameter."""
    found = []
    for part in representative.members:
        entries = part.entries(model.get_parameter(part.name))
        for unit in units:
            one, left = entries, unit
            for dim in reversed(range(len(part.units))):
                left, index = divmod(left, part.units[dim])
                width = entries.shape[dim] // part.units[dim]
                one = one.narrow(dim, index * width, width)
            found.append(one)
    return found


def _zero_columns(inputs: Tensor) -> Tensor:
    return (inputs == 0).all(0)


def _reader(
    before: dict[str, Tensor], after: dict[str, Tensor], units: list[int], n_units: int
) -> tuple[str, list[int]] | None:
    """Which matrix reads these units as zeros and no others, and in which columns.

    It may read something else before or behind them.
    """
    for path, inputs in after.items():
        if path not in before or before[path].shape != inputs.shape or inputs.shape[1] < n_units:
            continue
        zero = _zero_columns(inputs)
        became = set((zero & ~_zero_columns(before[path])).nonzero().flatten().tolist())
        for shift in {0, inputs.shape[1] - n_units}:
            columns = [unit + shift for unit in units]
            if became and became <= set(columns) and zero[columns].all():
                return path, columns
    return None


def _columns(model: nn.Module, path: str, columns: list[int]) -> list[Tensor]:
    module = model.get_submodule(path)
    if _transposed(module):
        return [module.weight.narrow(0, column, 1) for column in columns]
    groups = getattr(module, "groups", 1)
    n_out, n_in = module.weight.shape[0] // groups, module.weight.shape[1]
    return [
        module.weight.narrow(0, column // n_in * n_out, n_out).narrow(1, column % n_in, 1)
        for column in columns
    ]


def judge(
    model: nn.Module, run: Callable[[], Tensor], selection: list[Representative]
) -> tuple[str, set[str]]:
    """What is wrong with a selection, or nothing, and the kinds of matrix that read the units."""
    _, before = inputs_of(model, run)
    generator = torch.Generator().manual_seed(5)
    everywhere, columns_everywhere, readers = [], [], set()
    kinds: Counter[object] = Counter()
    for each in selection:
        kind = _kind_of(each.name), model.get_parameter(each.name).shape
        kinds[kind] += 1
        if kinds[kind] > _MOST_OF_A_KIND:
            continue
        n_units = each.n_units(model.get_parameter(each.name))
        units = sorted(
            torch.randperm(n_units, generator=generator)[: max(n_units // 4, 1)].tolist()
        )
        others = sorted(set(range(n_units)) - set(units))
        zeroed = rows(model, each, units)
        with _Changed(zeroed, 0.0):
            _, after = inputs_of(model, run)
        reader = _reader(before, after, units, n_units)
        if reader is None:
            if all(x.equal(before[path]) for path, x in after.items() if path in before):
                continue  # an expert that no token went to
            return f"nothing reads zeros where units of {each.name} are zero", readers
        path, columns = reader
        readers.add(_kind_of(path))
        for part in each.members:
            with _Changed(rows(model, Representative(part), units), 1.0):
                _, after = inputs_of(model, run)
            changed = (after[path] != before[path]).any(0).nonzero().flatten().tolist()
            if not changed or not set(changed) <= set(columns):
                return f"units of {part.name} are not those of {each.name}", readers
        reads = _columns(model, path, columns)
        with _Changed(rows(model, each, others), 0.0):
            one = run()
            with _Changed(reads, 10.0):
                two = run()
            if torch.allclose(one, two, rtol=1e-6, atol=1e-6):
                with _Changed([model.get_submodule(path).weight], 10.0):
                    two = run()
                # What the output does not depend on at all has no say for another reason.
                if not torch.allclose(one, two, rtol=1e-6, atol=1e-6):
                    return f"columns of {path} never matter", readers
        everywhere += zeroed
        columns_everywhere += reads
    with _Changed(everywhere, 0.0):
        one = run()
        with _Changed(columns_everywhere, 10.0):
            if not torch.allclose(one, run(), rtol=1e-6, atol=1e-6):
                return "columns that read zeros matter", readers
    return "", readers


def pairs(model: nn.Module, run: Callable[[], Tensor]) -> Iterator[tuple[str, str]]:
    """Two matrices of which the second reads zeros wherever rows of the first are zero.

    Of those that are called the same in the same class, only the first are tried.
    """
    _, before = inputs_of(model, run)
    tried = set()
    for path, module in matrices(model).items():
        holder, _, name = path.rpartition(".")
        upper = holder.rpartition(".")[0]
        kinds = tuple(type(model.get_submodule(each)).__name__ for each in (upper, holder))
        n_rows = module.weight.shape[1 if _transposed(module) else 0]
        if path not in before or n_rows < 8 or (*kinds, name, module.weight.shape) in tried:
            continue
        tried.add((*kinds, name, module.weight.shape))
        units = sorted(
            torch.randperm(n_rows, generator=torch.Generator().manual_seed(7))[
                : n_rows // 4
            ].tolist()
        )
        cut = [module.weight.narrow(1 if _transposed(module) else 0, unit, 1) for unit in units]
        if isinstance(bias := getattr(module, "bias", None), Tensor) and bias.shape == (n_rows,):
            cut += [bias.narrow(0, unit, 1) for unit in units]
        with _Changed(cut, 0.0):
            _, after = inputs_of(model, run)
        for other, inputs in after.items():
            if other == path or other not in before or before[other].shape != inputs.shape:
                continue
            became = (_zero_columns(inputs) & ~_zero_columns(before[other])).nonzero().flatten()
            columns, width = set(became.tolist()), inputs.shape[1]
            halves = (
                [u for u in units if u < n_rows // 2],
                [u - n_rows // 2 for u in units if u >= n_rows // 2],
            )
            plain = width == n_rows and columns == set(units)
            fused = 2 * width == n_rows and columns in (
                {*halves[0]},
                {*halves[1]},
                {*halves[0], *halves[1]},
            )
            if plain or fused:
                yield path, other


def judge_model(model: nn.Module, run: Callable[[], Tensor]) -> Verdict:
    """Select, leaving out what is refused as the messages say, and judge the rest."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    if n_parameters > _MOST_PARAMETERS:
        return Verdict("too large", 0)
    refusals: list[str] = []
    layouts: dict[str, dict[str, str]] = {}
    selection: list[Representative] = []
    while True:
        try:
            selection = FeedForwardSelector(layouts=layouts)(model)
            break
        except ValueError as error:
            way_out = _LEAVE_OUT.search(str(error))
            if way_out is None:
                if "found no feed-forward block" not in str(error):
                    return Verdict("WRONG", 0, f"no way out: {error}")
                break
            if way_out[1] in layouts:
                return Verdict("WRONG", 0, f"refused again: {error}")
            layouts[way_out[1]] = {}
            refusals.append(str(error))
    reason, readers = "", set()
    for gain in (1, 0.5, 2, 0.2):
        make_attentive_(model, gain)
        reason, readers = judge(model, run, selection)
        if "never matter" not in reason:
            break
    names = {part.name for each in selection for part in each.members}
    attention = [
        path for path, module in model.named_modules() if attention_blocks(path, module, {})
    ]

    def in_attention(name: str) -> bool:
        return any(name == path or name.startswith(f"{path}.") for path in attention)

    missed = tuple(
        sorted(
            {
                f"{first} -> {second}"
                for first, second in pairs(model, run)
                if f"{first}.weight" not in names and not in_attention(first)
            }
        )
    )
    sizes: Counter[str] = Counter()
    n_counted = 0
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if "Embedding" in type(module).__name__ or "lm_head" in name:
                continue
            n_counted += parameter.numel()
            if name not in names and _kind_of(path) not in readers and not in_attention(name):
                kind = type(model.get_submodule(path.rpartition(".")[0])).__name__
                sizes[f"{kind}.{path.rpartition('.')[2]}"] += parameter.numel()
    leftovers = tuple(
        f"{what} {size / n_counted:.0%}"
        for what, size in sizes.most_common()
        if size > n_counted / 10
    )
    word = "WRONG" if reason else "refused" if refusals else "exact" if selection else "nothing"
    return Verdict(word, len(selection), reason or " | ".join(refusals), missed, leftovers)


def _first(output: object) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def of_transformers(only: list[str]) -> Iterator[tuple[str, Verdict]]:
    """Every model type of both mappings."""
    for what, model_type, auto in model_types(only):

        def build(model_type: str = model_type, auto: object = auto) -> Verdict:
            model = small_transformer(model_type, auto)
            ids = tokens(1)
            run = torch.no_grad()(lambda: model(input_ids=ids).logits)
            return judge_model(model, run)

        yield what, _guarded(build, bool(only))


def of_timm(only: list[str]) -> Iterator[tuple[str, Verdict]]:
    """The smallest timm model for every class of block that any transformer-like model has."""
    import timm

    smallest: dict[str, tuple[int, str]] = {}
    for name in only or timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        size = sum(parameter.numel() for parameter in model.parameters())
        kinds = {f"{type(m).__module__}.{type(m).__name__}" for m in model.modules()}
        for kind in kinds if only else filter(_OF_INTEREST.search, kinds):
            smallest[kind] = min(smallest.get(kind, (size, name)), (size, name))
    for name in sorted({name for _, name in smallest.values()}):

        def build(name: str = name) -> Verdict:
            torch.manual_seed(0)
            model = timm.create_model(name).eval()
            shape = (1, *model.default_cfg["input_size"])
            image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            return judge_model(model, torch.no_grad()(lambda: _first(model(image))))

        yield name, _guarded(build, bool(only))


def _guarded(work: Callable[[], Verdict], loud: bool) -> Verdict:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(_SECONDS)
    try:
        return work()
    except Exception as error:  # a model that cannot be built must not hide the others
        if loud:
            traceback.print_exc()
        return Verdict("FAILED", 0, f"{type(error).__name__}: {error}".replace("\n", " ")[:200])
    finally:
        signal.alarm(0)


def main() -> None:
    """Judge all, or those that are named."""
    warnings.filterwarnings("ignore")
    torch.backends.mha.set_fastpath_enabled(False)
    library, only = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    for name, judged in (("transformers", of_transformers), ("timm", of_timm)):
        if library not in ("", name):
            continue
        words: Counter[str] = Counter()
        for what, verdict in judged(only):
            words[verdict.word] += 1
            print(
                f"{verdict.word:10}{what}: {verdict.n_blocks} blocks. {verdict.reason}", flush=True
            )
            for title, lines in (("missed", verdict.missed), ("left", verdict.leftovers)):
                for line in lines:
                    print(f"          {title}: {line}", flush=True)
        print(f"== {name}: {dict(words)}", flush=True)


if __name__ == "__main__":
    main()
