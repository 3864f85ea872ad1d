"""Real networks on real images: timm models on scikit-learn's digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torch_worm_optim import BatchNormSelector, Phase, WormOptimizer

timm = pytest.importorskip("timm")
datasets = pytest.importorskip("sklearn.datasets")

FAMILIES = [
    "resnet18",
    "resnetv2_50",
    "vgg11_bn",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "densenet121",
    "regnetx_002",
    "convnext_atto",
    "inception_v3",
    "ghostnet_050",
    "dla34",
    "hrnet_w18_small",
    "repvgg_a0",
    "mobileone_s0",
    "levit_128s",
    "vit_tiny_patch16_224",
]


def pytest_generate_tests(metafunc):
    """A few families, or with --every-timm-model all that timm has."""
    if "name_of_any" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_timm_model")
        metafunc.parametrize("name_of_any", timm.list_models() if every else FAMILIES)


def test_each_scale_of_a_timm_model_is_selected_once(name_of_any):
    """On the meta device, every affine BatchNorm of whatever class, and nothing else."""
    with torch.device("meta"):
        model = timm.create_model(name_of_any)
    scales = [
        module.weight
        for module in model.modules()
        if any("BatchNorm" in kind.__name__ for kind in type(module).__mro__)
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    ]
    if not scales:
        with pytest.raises(ValueError, match="found no BatchNorm or InstanceNorm layer"):
            BatchNormSelector()(model)
        return
    parameters = dict(model.named_parameters())

    selected = [parameters[r.name] for r in BatchNormSelector()(model)]

    assert len(selected) == len(scales)
    assert {id(scale) for scale in scales} == {id(scale) for scale in selected}


@pytest.fixture(scope="module")
def digits():
    """Two batches of real 8x8 images, enlarged to what the models' stems expect."""
    bunch = datasets.load_digits()
    images = torch.tensor(bunch.images[:32], dtype=torch.float32)[:, None] / 16
    images = nn.functional.interpolate(images, size=32).repeat(1, 3, 1, 1)
    return images.split(16), torch.tensor(bunch.target[:32]).split(16)


@pytest.mark.filterwarnings("ignore:.* leaves little of")  # after six steps
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"channels": (8, 16, 16, 32), "zero_init_last": False}),
        ("vgg11_bn", {"mlp_ratio": 0.125}),
        ("mobilenetv3_small_050", {}),
        ("efficientnet_b0", {}),
    ],
)
def test_a_real_network_is_searched_pruned_and_trained_on(name, options, digits):
    """A few steps on real digits: a ticket of exactly the promised size, held from then on."""
    model = timm.create_model(name, num_classes=10, **options)
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        model,
        # Two steps: a branch that timm starts at zero passes no gradient in the first.
        sample_every=2,
        window=3,
        stopping_point=0.5,
    )
    phases = []
    for step in range(10):
        images, labels = digits[0][step % 2], digits[1][step % 2]
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        opt.step()
        phases.append(opt.phase)
        if step == 6:
            opt.prune()

    n = sum(mask.numel() for mask in opt.final_mask.values())
    assert phases[4:6] == [Phase.SEARCHING, Phase.CONVERGED]
    assert sum(int((~mask).sum()) for mask in opt.final_mask.values()) == round(0.5 * n)
    assert len(opt.final_mask) == 2 * len(BatchNormSelector()(model))  # scales and shifts
    for scale, mask in opt.final_mask.items():
        assert model.get_parameter(scale)[~mask].count_nonzero() == 0
    assert torch.isfinite(loss)
