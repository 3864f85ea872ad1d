"""Truncating and holding at zero, against plain arithmetic."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import DTYPES, grad_lists, shares
from torch import nn

from torch_worm_optim import ParameterSelector, Part, Representative, WormOptimizer
from torch_worm_optim._binding import Binding
from torch_worm_optim.ticket import Restraint, Ticket, is_normalising

pytestmark = pytest.mark.filterwarnings("ignore:.* leaves little of")

HOLD = ("gradient", "update", "pruned")


class Moving(torch.optim.SGD):
    """Moves parameters by what it is told, whatever their gradients are."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1.0)
        self.moves = None

    @torch.no_grad()
    def step(self, closure=None):
        """Call the closure twice, as line searches do, and move."""
        loss = None
        for _ in range(2 if closure else 0):
            loss = closure()
        for parameter, move in zip(self.param_groups[0]["params"], self.moves or [], strict=False):
            parameter.add_(move)
        return loss


def holding(how, masks, dtypes, truncation=0.0):
    """Parameters of which these masks say what is kept, held back; each is 2 there, else 1."""
    model = nn.ParameterList(
        nn.Parameter((mask + 1).to(dtype)) for mask, dtype in zip(masks, dtypes, strict=True)
    )
    base = Moving(model.parameters())
    if how == "pruned":
        ticket = {str(i): mask for i, mask in enumerate(masks)}
        return model, WormOptimizer(base, model, ticket=ticket)
    n_kept, n = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    opt = WormOptimizer(
        base,
        model,
        ParameterSelector("*"),
        prune_ratio=1 - n_kept / n,
        min_keep=0,
        scope="global",
        sample_every=None,
        trigger="always",
        truncate=how,
        truncation=truncation,
        fade=1,
    )
    opt.sample()
    assert all(torch.equal(opt.candidate_mask[str(i)], mask) for i, mask in enumerate(masks))
    return model, opt


def dtypes_of(pairs):
    """The dtypes of gradients, some of which are None."""
    return [torch.float32 if gradient is None else gradient.dtype for gradient, _ in pairs]


@pytest.mark.filterwarnings("ignore:No representative parameter has a gradient")
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("how", HOLD)
@settings(max_examples=40)
@given(pairs=grad_lists(), truncation=shares)
def test_the_base_sees_a_share_of_the_gradients_of_removed_entries(
    with_closure, how, pairs, truncation
):
    """Kept gradients keep their bits, removed ones are r times what they were, None stays None."""
    assume(any(mask.any() for _, mask in pairs) and truncation < 1)
    model, opt = holding(how, [mask for _, mask in pairs], dtypes_of(pairs), truncation)
    share = {"gradient": truncation, "update": 1.0, "pruned": 0.0}[how]
    modes, storages = [], []

    def backward():
        modes.append(torch.is_grad_enabled())
        for parameter, (gradient, _) in zip(model, pairs, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        storages[:] = [p.grad.data_ptr() for p in model if p.grad is not None]
        return "loss"

    if not with_closure:
        backward()
    with torch.no_grad():
        loss = opt.step(backward if with_closure else None)

    assert (loss, modes) == (("loss", [True, True]) if with_closure else (None, [True]))
    assert storages == [p.grad.data_ptr() for p in model if p.grad is not None]
    for parameter, (gradient, mask) in zip(model, pairs, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad[mask], gradient[mask])
            r = torch.tensor(share, dtype=gradient.dtype)
            assert torch.equal(parameter.grad[~mask], gradient[~mask] * r)


@given(grad_lists(), shares)
def test_a_share_of_the_updates_of_removed_entries_is_left(pairs, truncation):
    """Kept entries keep the bits that the optimizer gave them; removed ones go r of the way."""
    pairs = [(move, mask) for move, mask in pairs if move is not None]
    assume(any(mask.any() for _, mask in pairs) and truncation < 1)
    model, opt = holding("update", [mask for _, mask in pairs], dtypes_of(pairs), truncation)
    opt.base_optim.moves = [move for move, _ in pairs]
    old = [torch.linspace(-1, 1, p.numel()).view(p.shape).to(p.dtype) for p in model]
    with torch.no_grad():
        for parameter, start in zip(model, old, strict=True):
            parameter.copy_(start).grad = torch.ones_like(start)
    opt.step()

    for parameter, start, (move, mask) in zip(model, old, pairs, strict=True):
        new, end = start + move, parameter.detach()
        assert torch.equal(end[mask], new[mask])
        if truncation == 0:
            assert torch.equal(end[~mask], start[~mask])
        expected = start.double() + truncation * (new.double() - start.double())
        tolerance = 8 * torch.finfo(new.dtype).eps
        assert (end.double() - expected)[~mask].abs().le(tolerance * 5).all()


@given(shares, shares, shares)
def test_a_step_is_the_formula(g, u, f):
    """A removed entry becomes f (w + u (what the base does with g times its gradient))."""
    model = nn.ParameterDict({"w": torch.tensor([1.0, 1.0], dtype=torch.float64)})
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    ticket = Ticket.given(model, {"w": torch.tensor([True, False])}, lambda _: [])
    binding = Binding(model, base, ["w"])
    restraint = Restraint(binding, ticket, set(), gradient=g, update=u, factor=f)

    model["w"].grad = torch.full_like(model["w"], 3.0)
    restraint.step(lambda closure: base.step(closure), None)

    kept, removed = model["w"].tolist()
    assert kept == 1 - 0.5 * 3
    assert removed == pytest.approx(f * (1 - u * 0.5 * g * 3), abs=1e-12)


@given(grad_lists())
def test_removed_entries_are_zero_after_each_step(pairs):
    """Whatever the optimizer does, even to infinity; kept entries have the bits that it gave."""
    pairs = [(move, mask) for move, mask in pairs if move is not None]
    assume(pairs)
    model, opt = holding("pruned", [mask for _, mask in pairs], dtypes_of(pairs))
    for parameter, (_, mask) in zip(model, pairs, strict=True):
        assert torch.equal(parameter != 0, mask)
    before = [parameter.detach().clone() for parameter in model]
    opt.base_optim.moves = [move.masked_fill(~mask, torch.inf) for move, mask in pairs]
    opt.step()

    for old, parameter, (move, mask) in zip(before, model, pairs, strict=True):
        expected = torch.where(mask, old + move, torch.zeros_like(old))
        assert torch.equal(parameter.detach(), expected)


@pytest.mark.parametrize("how", HOLD)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_left_of_what_is_infinite(how, dtype):
    """With r = 0 infinite gradients and updates become no gradient and no update, not NaN."""
    mask = torch.tensor([True, False, False])
    model, opt = holding(how, [mask], [dtype])
    start = model[0].detach().clone()
    infinite = torch.tensor([0.0, torch.inf, torch.nan], dtype=dtype)
    model[0].grad = infinite.clone()
    if how != "gradient":
        opt.base_optim.moves = [infinite]
    opt.step()

    assert torch.equal(model[0].detach(), start)
    if how != "update":
        assert model[0].grad.count_nonzero() == 0


@pytest.mark.parametrize("sparse_dim", [1, 2])
@pytest.mark.parametrize("how", ["gradient", "pruned"])
@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=8), shares)
def test_sparse_gradients_are_scaled_as_dense_ones(sparse_dim, how, places, truncation):
    """Rows or entries, repeated ones included, of a parameter of which a part is ranked."""
    part = Representative(Part("weight", index=(slice(1, 4), slice(0, 2))))
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[1:4, :2] = torch.rand(3, 2).argsort(0) > 0
    assume(truncation < 1)
    runs = []
    indices = torch.tensor(places).T[:sparse_dim]
    values = torch.rand(len(places), *(3,) * (2 - sparse_dim))
    sparse = torch.sparse_coo_tensor(indices, values, (5, 3), check_invariants=True)
    for gradient in (sparse.clone(), sparse.to_dense()):
        model = nn.Embedding(5, 3, _weight=mask + 1.0)
        base = Moving(model.parameters())
        if how == "pruned":
            opt = WormOptimizer(base, model, ticket={"weight": mask})
        else:
            options = {"sample_every": None, "trigger": "always", "truncation": truncation}
            options |= {"prune_ratio": float((~mask).sum() / 6)}
            opt = WormOptimizer(base, model, lambda _: [part], **options)
            opt.sample()
            assert torch.equal(opt.candidate_mask["weight"], mask)
        model.weight.grad = gradient
        opt.step()
        runs.append(model.weight.grad)

    assert runs[0].is_sparse
    torch.testing.assert_close(runs[0].to_dense(), runs[1])
    scaled = sparse.to_dense()
    scaled[~mask] *= 0.0 if how == "pruned" else truncation
    torch.testing.assert_close(runs[1], scaled)


@pytest.mark.parametrize("name", ["0.weight", "1.weight"])
def test_a_parameter_with_two_names_is_held_once(name):
    """Tied weights have two names; a ticket may use either, or both, and then removes either's."""
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
    model[1].weight = model[0].weight
    ticket = {name: torch.tensor([False, True, True])}
    opt = WormOptimizer(Moving(model.parameters()), model, ticket=ticket)
    assert model[0].weight.tolist() == [0, 1, 1]

    other = "1.weight" if name == "0.weight" else "0.weight"
    ticket[other] = torch.tensor([True, True, False])
    opt = WormOptimizer(Moving(model.parameters()), model, ticket=ticket)
    opt.base_optim.moves = [torch.ones(3)]
    opt.step()

    assert model[0].weight.tolist() == [0, 2, 0]


def replace_module(model):
    """Another module, with parameters of its own, under the old name."""
    model[0][0] = copy.deepcopy(model[0][0])


def replace_outer_module(model):
    """Another module around the one that has the parameter."""
    model[0] = copy.deepcopy(model[0])


def replace_parameter(model):
    """Another parameter in the old module, as sharding makes it."""
    model[0][0].weight = nn.Parameter(model[0][0].weight.detach().clone())


def replace_memory(model):
    """The same parameter with other memory."""
    model[0][0].weight.data = model[0][0].weight.detach().clone()


def swap(model):
    """Another tensor in the parameter's place."""
    weight = model[0][0].weight
    torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone()))


CHANGES = [replace_module, replace_outer_module, replace_parameter, replace_memory, swap]


@pytest.mark.parametrize(
    "change", [*CHANGES, nn.Module.half, nn.Module.double], ids=lambda change: change.__name__
)
@pytest.mark.parametrize("how", HOLD)
def test_what_is_replaced_between_steps_is_found(how, change):
    """Whatever stands under a name now is held back, by the mask that there was."""
    mask = torch.tensor([True, False, True, False])
    model = nn.Sequential(nn.Sequential(nn.BatchNorm1d(4)))
    model[0][0].weight.data.add_(mask)
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    if how == "pruned":
        opt = WormOptimizer(base, model, ticket={"0.0.weight": mask})
    else:
        options = {"truncation": 0.0, "truncate": how, "trigger": "always", "fade": 1}
        options["sample_every"] = None
        opt = WormOptimizer(base, model, lambda _: [Representative("0.0.weight")], **options)
        opt.sample()
    for changed in (False, True):
        opt.zero_grad()
        if changed:
            change(model)
            opt.param_groups[0]["params"] = list(model.parameters())
        before = model[0][0].weight.detach().clone()
        model[0][0].weight.grad = torch.ones_like(before)
        opt.step()
        assert torch.equal(model[0][0].weight.detach() == before, ~mask)


def test_a_parameter_that_is_untied_is_held_under_both_names():
    """Each of the two is what stands under a name of the ticket."""
    mask = torch.tensor([True, False, True])
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
    model[1].weight = model[0].weight
    base = torch.optim.SGD(model.parameters(), lr=0.5)
    opt = WormOptimizer(base, model, ticket={"0.weight": mask, "1.weight": mask})
    model[1].weight = nn.Parameter(torch.ones(3))
    opt.param_groups[0]["params"] = list(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    opt.step()

    assert model[0].weight.tolist() == model[1].weight.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (name, True)
        for name in (
            *("NAdamW", "LaProp", "SignSGD", "Lion", "Adan", "RMSpropTF", "Yogi", "Adopt", "Rprop"),
            *("Lamb", "FusedLAMB", "Prodigy", "SophiaG", "Shampoo", "SOAP", "Muon", "Kron", "CAME"),
            *("NovoGrad", "NvNovoGrad", "MADGRAD", "Mars", "AdEMAMix", "Ranger21", "Tiger"),
        )
    ]
    + [
        (name, False)
        for name in ("LambdaSGD", "DesignedSGD", "CanadaSGD", "SGDP", "Lookahead", "SGDMars")
    ],
)
def test_names_of_normalising_optimizers_are_told_from_others(name, expected):
    """A name that only holds the letters of another is not taken for it."""
    made = type(name, (torch.optim.SGD,), {})([torch.zeros(1, requires_grad=True)])

    assert is_normalising(made) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SGD", False),
        ("ASGD", False),
        ("LBFGS", False),
        *[(name, True) for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop")],
        *[(name, True) for name in ("Adagrad", "Adadelta", "Adafactor", "Rprop", "SparseAdam")],
    ],
)
def test_normalising_optimizers_are_known(name, expected):
    """Those that divide by the gradient's own size are told from those that do not."""
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    kind = getattr(torch.optim, name)

    assert is_normalising(kind([torch.zeros(1, requires_grad=True)])) is expected
    assert (
        is_normalising(type("Mine", (kind,), {})([torch.zeros(1, requires_grad=True)])) is expected
    )
