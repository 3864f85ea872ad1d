"""Every optimizer of torch and timm, wrapped."""

from __future__ import annotations

import pytest
from every_optimizer import (
    UnavailableError,
    judge,
    plain_resumes,
    timm_names,
    torch_names,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*normalises gradients"),
    # timm's Kron recommends a package, and AdaHessian needs what torch warns of.
    pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True"),
]


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch):
    """Kron compiles itself where it can, which takes longer than all that is tested here."""
    if timm_names():
        monkeypatch.setattr("timm.optim.kron.has_dynamo", False)


@pytest.mark.parametrize("name", torch_names() + timm_names())
def test_every_optimizer_can_be_wrapped(name):
    """Plain bits with r = 1, truncation both ways, closures, pruning, and resuming to the bit."""
    try:
        verdict = judge(name)
    except UnavailableError as reason:
        pytest.skip(str(reason))

    assert verdict._replace(resumes=True) == (True,) * 6
    # AdaHessian keeps the state of its random numbers out of its checkpoint.
    assert verdict.resumes or not plain_resumes(name)


def test_no_optimizer_is_forgotten():
    """The names are those that torch exports, and cannot become an empty list unnoticed."""
    assert {"torch.SGD", "torch.AdamW fused", "torch.LBFGS", "torch.Adagrad"} <= set(torch_names())
    if timm_names():
        assert {"timm.sgd", "timm.kron", "timm.lion"} <= set(timm_names())
