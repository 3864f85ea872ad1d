"""What is a CUDA device's own: fused steps, graphs, NCCL, and shrinking under its autocast.

The rest of the suite runs there with ``pytest --device cuda``.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import Residual, Sequence, tensors_of, zero_channels
from torch import nn
from training import SCALES, loss_of, same, small_cnn, train, weights_of

from torch_worm_optim import (
    FeedForwardSelector,
    Phase,
    QueryKeySelector,
    WormOptimizer,
    load_shrunk_,
)
from torch_worm_optim.search import fingerprint
from torch_worm_optim.shrink import shrink_

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore:.*normalises gradients")]

SEARCH = {"sample_every": 3, "window": 3, "stopping_point": 1.0, "trigger": "always"}


@pytest.fixture(autouse=True)
def _precise():
    """Convolutions in full precision."""
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


def on_device(dtype=torch.float32):
    """The small network on the device."""
    return small_cnn(dtype).cuda()


@pytest.mark.parametrize("option", ["", "foreach", "fused"])
@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_what_is_pruned_stays_zero(kind, option):
    """Under momentum and weight decay, whatever implementation takes the step."""
    model = on_device()
    settings = {"lr": 0.02, "weight_decay": 0.1, **({option: True} if option else {})}
    if kind == "SGD":
        settings["momentum"] = 0.9
    base = getattr(torch.optim, kind)(model.parameters(), **settings)
    opt = WormOptimizer(base, model, **SEARCH)
    train(model, opt, range(9))
    opt.prune()
    train(model, opt, range(9, 15))

    assert opt.phase is Phase.PRUNED
    for name, mask in opt.final_mask.items():
        assert mask.device == model.get_parameter(name).device
        assert not model.get_parameter(name)[~mask].any()


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("option", ["", "fused"])
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_training_a_shrunk_network_is_training_the_pruned_one(kind, option, scatter):
    """The state of fused optimizers included, in double precision."""
    model = on_device(torch.double)
    settings = {"lr": 0.02, **({option: True} if option else {})}
    if kind == "SGD":
        settings["momentum"] = 0.9
    base = getattr(torch.optim, kind)(model.parameters(), **settings)
    opt = WormOptimizer(base, model, **SEARCH)
    train(model, opt, range(9))
    opt.prune()
    train(model, opt, range(9, 11))
    twin, twin_opt = copy.deepcopy((model, opt))

    report = opt.shrink(torch.ones(1, 1, 6, 6, dtype=torch.double, device="cuda"), scatter=scatter)
    assert all(i is None or i.device.type == "cpu" for kept in report.kept.values() for i in kept)
    assert model[0].out_channels == int(opt.final_mask["1.weight"].sum())
    for each, optimizer in ((model, opt), (twin, twin_opt)):
        train(each, optimizer, range(11, 31))

    torch.testing.assert_close(loss_of(model, 31), loss_of(twin, 31), rtol=1e-9, atol=1e-9)
    fresh = on_device(torch.double)
    load_shrunk_(fresh, model.state_dict())
    assert same(weights_of(fresh), weights_of(model))


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [Sequence, Residual])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_stay(make, memory_format, scatter, autocast):
    """In evaluation and in training mode."""
    model = make().cuda().to(memory_format=memory_format)
    zero_channels(model)
    model = model.cuda()
    twin = copy.deepcopy(model)
    images = torch.randn(4, 3, 8, 8, device="cuda").to(memory_format=memory_format)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        report = shrink_(model, images[:2], scatter=scatter)
        assert report.parameters[1] < report.parameters[0]
        for training in (False, True):
            outputs = []
            for each in (model, twin):
                each.train(training)
                for module in each.modules():
                    if isinstance(module, nn.Dropout):
                        module.eval()
                outputs.append(tensors_of(each(images)))
            tolerance = 0.1 if autocast else 1e-4
            for a, b in zip(*outputs, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def bert():
    """BERT with two small layers and the attention that its library prefers, and its inputs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokens = torch.randint(50, (3, 10), device="cuda")
    return transformers.BertForSequenceClassification(config), {"input_ids": tokens}


def vit():
    """A vision transformer of timm with two small layers, and its inputs."""
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    return model, {"x": torch.randn(3, 3, 32, 32, device="cuda")}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", [bert, vit])
def test_a_transformer_is_searched_and_shrunk(make, autocast):
    """Masks are those of a CPU, heads and rows are cut out, and what it computes stays."""
    model, batch = make()
    selector = FeedForwardSelector() | QueryKeySelector(value=True, granularity="head")
    masks = []
    for each in (copy.deepcopy(model), model.cuda()):
        adamw = torch.optim.AdamW(each.parameters(), 1e-3)
        options = {"window": 2, "stopping_point": 1.0, "scope": "selector", "sample_every": None}
        opt = WormOptimizer(adamw, each, selector, truncate="update", **options)
        opt.sample()
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.mul_(1.5)  # No mask is drawn unless a weight has changed.
        opt.sample()
        masks.append({name: mask.cpu() for name, mask in opt.final_mask.items()})
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][name], mask) for name, mask in masks[1].items())

    def output():
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            result = model(**batch)
        return getattr(result, "logits", result)

    output().float().square().mean().backward()
    opt.step()
    opt.zero_grad()
    opt.prune()
    expected = output()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        report = opt.shrink(**batch)
    assert report.parameters[1] < report.parameters[0]
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(output(), expected, rtol=tolerance, atol=tolerance)
    output().float().square().mean().backward()
    opt.step()


def test_a_step_after_each_replay_of_a_graph_is_a_step():
    """Forward and backward in a CUDA graph, and steps between replays, through all phases."""
    models = [on_device(), on_device()]
    opts = [
        WormOptimizer(torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9), m, **SEARCH)
        for m in models
    ]
    images = torch.zeros(16, 1, 6, 6, device="cuda")
    labels = torch.zeros(16, dtype=torch.long, device="cuda")

    def forward_and_backward(model):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        nn.functional.cross_entropy(model(images), labels).backward()

    def batch(step):
        generator = torch.Generator().manual_seed(step)
        images.copy_(torch.randn(images.shape, generator=generator))
        labels.copy_((images.mean((1, 2, 3)) * 8).round().clamp(-1, 1).long() + 1)

    warm = copy.deepcopy(models[0].state_dict())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_and_backward(models[0])
    torch.cuda.current_stream().wait_stream(stream)
    models[0].load_state_dict(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_and_backward(models[0])
    models[0].load_state_dict(warm)
    forward_and_backward(models[1])
    models[1].load_state_dict(warm)

    for step in range(16):
        batch(step)
        graph.replay()
        forward_and_backward(models[1])
        for opt in opts:
            opt.step()
        if step == 10:
            for opt in opts:
                opt.prune()

    assert opts[0].phase is Phase.PRUNED
    assert opts[0].history == opts[1].history
    torch.testing.assert_close(weights_of(models[0]), weights_of(models[1]))
    for name in SCALES:
        assert not models[0].get_parameter(name)[~opts[0].final_mask[name]].any()


def test_a_compiled_network_is_searched_and_shrunk():
    """Inductor's code, compiled anew for the smaller network."""
    model = on_device()
    compiled = torch.compile(model)
    opt = WormOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), compiled, **SEARCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Triton's and the compiler's own
        for step in range(14):
            opt.zero_grad()
            loss_of(compiled, step).backward()
            opt.step()
            if step == 10:
                opt.prune()
                opt.shrink(torch.ones(1, 1, 6, 6, device="cuda"))
        torch.testing.assert_close(loss_of(compiled, 14), loss_of(model, 14), rtol=1e-3, atol=1e-3)
    assert model[0].out_channels == int(opt.final_mask["_orig_mod.1.weight"].sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_fingerprint_is_the_same_on_every_device(dtype):
    """So a search that goes on elsewhere knows whether something has moved."""
    tensors = [torch.randn(70_000).to(dtype), torch.randn(3, 5).to(dtype)]
    on_gpu = [tensor.cuda() for tensor in tensors]
    assert fingerprint(tensors) == fingerprint(on_gpu)


def test_shards_on_a_device_have_the_masks_of_one_process():
    """FSDP2 over NCCL, with the only rank there is: histories, weights and the ticket are equal."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        runs = []
        for sharded in (True, False):
            model = on_device()
            if sharded:
                fsdp.fully_shard(model)
            base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            opt = WormOptimizer(base, model, **SEARCH)
            train(model, opt, range(9))
            opt.prune()
            train(model, opt, range(9, 13))
            whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in model.parameters()]
            masks = [getattr(m, "full_tensor", lambda m=m: m)() for m in opt.final_mask.values()]
            runs.append((opt.history, opt.phase, [p.detach() for p in whole], masks))
    finally:
        torch.distributed.destroy_process_group()
    assert runs[0][:2] == runs[1][:2]
    torch.testing.assert_close(runs[0][2], runs[1][2])
    assert same(runs[0][3], runs[1][3])
