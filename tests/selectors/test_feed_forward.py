"""What the selection of hidden units holds: proved by what units of zeros do."""

from __future__ import annotations

import re
import time

import every_attention
import every_feed_forward
import pytest
import torch
from attention_maps import make_attentive_
from torch import nn
from torch.nn import functional as F

from torch_worm_optim import FeedForwardSelector, QueryKeySelector, WormOptimizer

ARCHITECTURES = [
    "bert",  # two sibling modules of a layer
    "gpt2",  # transposed
    "distilbert",  # lin1 and lin2, an activation that is a function
    "t5",  # wi and wo
    "llama",  # gated
    "phi3",  # gated, fused
    "modernbert",  # the same in the other order, without biases
    "albert",  # one block for all layers
]


class Block(nn.Module):
    """A block of these layers, with up, gate and down where it has them."""

    def __init__(self, activation=F.gelu, **layers: nn.Module) -> None:
        super().__init__()
        self.act = activation
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.path = list(layers)

    def forward(self, x):
        """In the order of the layers; of three the first is the gate."""
        if len(self.path) == 3:
            gate, up, down = (getattr(self, name) for name in self.path)
            return down(self.act(gate(x)) * up(x))
        up, down = (getattr(self, name) for name in self.path)
        hidden = up(x)
        if hasattr(self, "halves"):
            halves = hidden.chunk(2, -1)
            hidden = self.act(halves[0]) * halves[1]
        else:
            hidden = self.act(hidden)
        return down(hidden)


class MLP(Block):
    """A block with a name that says so."""


class Fused(MLP):
    """Gate and up in one matrix of a name that tells it, or not."""

    halves = True


class BertLike(nn.Module):
    """Two sibling modules."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(6, 10)
        self.intermediate.intermediate_act_fn = nn.GELU()
        self.output = nn.Module()
        self.output.dense = nn.Linear(10, 6)
        self.output.LayerNorm = nn.LayerNorm(6)

    def forward(self, x):
        """Post-norm."""
        hidden = self.intermediate.intermediate_act_fn(self.intermediate.dense(x))
        return self.output.LayerNorm(self.output.dense(hidden) + x)


class Conv1D(nn.Module):
    """As GPT-2 has it: inputs by outputs."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        """Linear."""
        return x @ self.weight + self.bias


class WithConvolution(nn.Module):
    """A depthwise convolution on the way, as PVT and SegFormer have it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(6, 10, 1), nn.GELU(), nn.Conv2d(10, 6, 1)
        self.dwconv = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.bn = nn.BatchNorm2d(10)

    def forward(self, x):
        """Over positions in a square."""
        square = x.mT.unflatten(-1, (2, 4))
        return self.fc2(self.act(self.bn(self.dwconv(self.fc1(square))))).flatten(2).mT


def of_timm(name, **options):
    """A block of timm's."""
    return getattr(pytest.importorskip("timm").layers, name)(6, 10, **options)


MODULES = {
    "bert": (BertLike, ["intermediate.dense.weight"]),
    "fc": (lambda: Block(fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6)), ["fc1.weight"]),
    "without bias": (
        lambda: Block(lin1=nn.Linear(6, 10, False), lin2=nn.Linear(10, 6)),
        ["lin1.weight"],
    ),
    "transposed": (lambda: Block(c_fc=Conv1D(6, 10), c_proj=Conv1D(10, 6)), ["c_fc.weight"]),
    "gated": (
        lambda: Block(
            torch.sigmoid,  # what a gate makes of 0 does not matter
            gate_proj=nn.Linear(6, 10),
            up_proj=nn.Linear(6, 10),
            down_proj=nn.Linear(10, 6),
        ),
        ["gate_proj.weight", "up_proj.weight"],
    ),
    "fused": (
        lambda: Fused(F.silu, gate_up_proj=nn.Linear(6, 20), down_proj=nn.Linear(10, 6)),
        ["gate_up_proj.weight"] * 2,
    ),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 10, 0.0, batch_first=True),
        ["linear1.weight"],
    ),
    "sequence": (
        lambda: nn.ModuleDict(
            {"mlp": nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))}
        ),
        ["mlp.1.weight"],
    ),
    "sequence of convolutions": (
        lambda: nn.ModuleDict(
            {
                "mlp": nn.Sequential(
                    *(nn.Conv2d(6, 10, 1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 6, 1))
                )
            }
        ),
        ["mlp.0.weight"],
    ),
    "convolution": (WithConvolution, ["fc1.weight"]),
    "timm Mlp": (lambda: of_timm("Mlp"), ["fc1.weight"]),
    "timm ConvMlp": (lambda: of_timm("ConvMlp"), ["fc1.weight"]),
    "timm SwiGLU": (lambda: of_timm("SwiGLU"), ["fc1_g.weight", "fc1_x.weight"]),
    "timm GluMlp": (lambda: of_timm("GluMlp"), ["fc1.weight"] * 2),
}


@pytest.fixture(autouse=True)
def _plain_attention():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def judge(model, run, selector=None):
    """What is wrong with what is selected, or nothing."""
    make_attentive_(model, 1)
    return every_feed_forward.judge(model, torch.no_grad()(run), selector(model))[0]


@pytest.mark.parametrize("kind", MODULES)
def test_a_unit_of_zeros_is_without_influence_and_others_are_not(kind):
    """Columns that read removed units do nothing; the same columns matter if others go."""
    build, names = MODULES[kind]
    model = build().eval()
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    if "Conv" in kind or "convolutions" in kind:
        x = x.mT[..., None]
    layers = model.values() if isinstance(model, nn.ModuleDict) else [model]

    def run():
        y = x
        for layer in layers:
            y = layer(y)
        return y

    [block] = FeedForwardSelector()(model)

    assert judge(model, run, FeedForwardSelector()) == ""
    assert [part.name for part in block.parts] == names
    assert block.n_units(model.get_parameter(block.name)) == (5 if kind == "timm GluMlp" else 10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers(model_type):
    """The same for the blocks of whole models, and none is missed."""
    transformers = pytest.importorskip("transformers")
    model = every_attention.small_transformer(
        model_type, transformers.AutoModelForSequenceClassification
    )
    ids = every_attention.tokens(1)
    run = torch.no_grad()(lambda: model(input_ids=ids).logits)

    verdict = every_feed_forward.judge_model(model, run)

    assert verdict.word == "exact", verdict
    assert verdict.n_blocks >= (1 if model_type == "albert" else 2)
    # What behaves alike and is none: heads, and a bottleneck of embeddings.
    assert [m for m in verdict.missed if not re.search("classif|score|embedding", m)] == []


@pytest.mark.filterwarnings("ignore")
def test_fused_experts_are_refused_and_the_line_that_leaves_them_out_works():
    """One tensor for all experts cannot lose a row for one; what they share is a block."""
    transformers = pytest.importorskip("transformers")
    model = every_attention.small_transformer("qwen2_moe", transformers.AutoModelForCausalLM)

    message = (
        r"'gate_up_proj' of 'model\.layers\.0\.mlp\.experts' \(Qwen2MoeExperts\), of shape "
        r"\(4, 64, 64\), .* FeedForwardSelector\(layouts=\{\"Qwen2MoeExperts\": \{\}\}\)"
    )
    with pytest.raises(ValueError, match=message):
        FeedForwardSelector()(model)
    others = FeedForwardSelector(layouts={"Qwen2MoeExperts": {}})(model)
    assert [each.name for each in others][:1] == [
        "model.layers.0.mlp.shared_expert.gate_proj.weight"
    ]


def test_experts_that_are_modules_are_blocks():
    """A mixture of separate blocks has units like any other."""
    experts = nn.ModuleList(Block(fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6)) for _ in range(3))

    assert [each.name for each in FeedForwardSelector()(experts)] == [
        f"{i}.fc1.weight" for i in range(3)
    ]


class Odd(nn.Module):
    """A block in words of its own."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)


class OddMLP(Odd):
    """The same, called like one."""


def with_norm():
    """A block with a norm before its second matrix."""
    return of_timm("Mlp", norm_layer=nn.LayerNorm)


def parametrized():
    """A block with weight normalisation."""
    block = Block(fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6))
    nn.utils.parametrizations.weight_norm(block.fc1)
    return block


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: OddMLP(expand=nn.Linear(6, 10), contract=nn.Linear(10, 6)),
            r"does not know what 'expand\.weight' makes in 'the model' \(OddMLP\), of shape "
            r"\(10, 6\)\. .*layouts=\{\"OddMLP\": \{\"expand\": \"up\", \"contract\": \"down\"\}\}",
        ),
        (
            lambda: OddMLP(fc1=nn.Linear(6, 20), fc2=nn.Linear(10, 6)),
            r"'fc1\.weight' makes .* a fused matrix of shape \(20, 6\)\. .*\"fc1\": \"gate up\"",
        ),
        (
            with_norm,
            r"10 hidden units of 'the model' \(Mlp\), made by 'fc1\.weight' of shape \(10, 6\), "
            r"pass through 'norm' \(LayerNorm\).*layouts=\{\"Mlp\": \{\}\}",
        ),
        (
            lambda: Block(torch.sigmoid, fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6)),
            r"'fc1\.weight' of shape \(10, 6\), pass through 'act' \(sigmoid\), which does not map "
            r"0 to 0\. Leave it out: FeedForwardSelector\(layouts=\{\"Block\": \{\}\}\)",
        ),
        (
            lambda: Block(nn.Softplus(), fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6)),
            r"'act' \(Softplus\)",
        ),
        (parametrized, r"'fc1\.weight' of 'the model' \(Block\) is computed from other parameters"),
        (lambda: nn.Linear(2, 2), "found no feed-forward block in Linear"),
        # A head: it ends in classes, and its names are none of a block.
        (lambda: Odd(dense=nn.Linear(6, 6), out_proj=nn.Linear(6, 3)), "found no .* in Odd"),
        (lambda: Odd(fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 3)), "found no .* in Odd"),
        (lambda: of_timm("SEModule"), "found no .* in SEModule"),
    ],
)
def test_what_cannot_be_selected_says_why_and_what_to_pass(build, message):
    """The module's name, its shape, and the way out."""
    with pytest.raises(ValueError, match=message):
        FeedForwardSelector()(build())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            {"expand": "up", "contract": "up"},
            r"got \{'up expand\.weight': 10.*'up contract\.weight': 6",
        ),
        ({"expand": "gate", "contract": "down"}, "needs an `up`.*got none"),
        ({"expand": "gate=7 up", "contract": "down"}, r"units wherever .* got"),
        (
            {"expand": "3 * (gate up)"},
            r"'3 \* \(gate up\)' does not fit 'expand\.weight'.*\(10, 6\)",
        ),
    ],
)
def test_a_layout_that_does_not_fit_says_so(layout, message):
    """A line that was passed is checked against the shapes."""
    model = OddMLP(expand=nn.Linear(6, 10), contract=nn.Linear(10, 6))

    with pytest.raises(ValueError, match=message):
        FeedForwardSelector(layouts={"OddMLP": layout})(model)


def test_a_layout_is_stated_in_one_line():
    """Gates of their own, halves and rows that take turns."""
    apart = OddMLP(a=nn.Linear(6, 10), b=nn.Linear(6, 10), c=nn.Linear(10, 6))
    fused = OddMLP(a=nn.Linear(6, 20), c=nn.Linear(10, 6))

    def selected(model, **layout):
        [block] = FeedForwardSelector(layouts={"OddMLP": layout})(model)
        weights = dict(model.named_parameters())
        parts = [(part.name, part.entries(weights[part.name])) for part in block.members]
        return {f"{n} {name}": entries for n, (name, entries) in enumerate(parts)}

    assert list(selected(apart, a="gate", b="up", c="down")) == [
        "0 a.weight",
        "1 b.weight",
        "2 a.bias",
        "3 b.bias",
    ]
    halves = list(selected(fused, a="up gate", c="down").values())
    assert halves[0].equal(fused.a.weight[:10])
    assert halves[3].equal(fused.a.bias[10:])
    turns = list(selected(fused, a="10 * (gate up)", c="down").values())
    assert turns[0].squeeze(1).equal(fused.a.weight[::2])
    assert turns[1].squeeze(1).equal(fused.a.weight[1::2])


@pytest.mark.parametrize("kind", ["BlockWithAttn", "ChannelAttentionNet", "Block", "SEquence"])
def test_what_holds_a_block_does_not_decide_by_its_name(kind):
    """A block in a module that is called like a gate of channels is a block."""
    model = type(kind, (nn.Module,), {})()
    model.mlp = MLP(fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6))

    assert [each.name for each in FeedForwardSelector()(model)] == ["mlp.fc1.weight"]


def test_what_is_left_out_for_its_name_is_named(caplog):
    """One line for each class that would have been a block under another name."""

    class ChannelAttention(Block):
        pass

    def block(kind):
        return kind(fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6))

    model = nn.ModuleList([block(MLP), block(ChannelAttention), block(ChannelAttention)])
    layouts = {"ChannelAttention": {"fc1": "up", "fc2": "down"}}
    with caplog.at_level("INFO", "torch_worm_optim"):
        assert len(FeedForwardSelector()(model)) == 1
        assert len(FeedForwardSelector(layouts=layouts)(model)) == 3

    [line] = caplog.messages
    assert "leaves out ChannelAttention, '1' for one" in line
    assert 'layouts={"ChannelAttention": {...}}' in line


class InThreeDimensions(nn.Module):
    """An activation of positions in a sequence, and of nothing else."""

    def __init__(self, at_zero: float) -> None:
        super().__init__()
        self.at_zero = at_zero

    def forward(self, x):
        """A shift, or nothing."""
        if x.ndim != 3:
            raise ValueError("positions, please")
        return x + self.at_zero


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        *((nn.Softmax(dim=dim), "does not map 0 to 0") for dim in (-1, 1, 2, 3)),
        (nn.Softmax2d(), "does not map 0 to 0"),
        (InThreeDimensions(1.0), "does not map 0 to 0"),
        (lambda x, y: x, r"cannot be called with zeros of shape \(2,\) or \(1, 10\)"),
    ],
)
def test_activations_of_any_number_of_dimensions_are_tried(activation, message):
    """What can be called with zeros of some shape must give zeros, and the rest is refused."""
    with pytest.raises(ValueError, match=f"{message}.*Leave it out"):
        FeedForwardSelector()(Block(activation, fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6)))


@pytest.mark.parametrize(
    "activation", [InThreeDimensions(0.0), nn.PReLU(10), nn.ReLU(inplace=True), F.gelu]
)
def test_activations_that_keep_zero_are_kept(activation):
    """In whatever shape they take."""
    block = Block(activation, fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6))

    assert len(FeedForwardSelector()(block)) == 1


def test_activations_are_tried_where_their_buffers_have_no_data():
    """On the meta device as anywhere."""

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("slope", torch.full((1,), 3.0))

        def forward(self, x):
            return x * self.slope

    with torch.device("meta"):
        block = Block(Steep(), fc1=nn.Linear(6, 10), fc2=nn.Linear(10, 6))

    assert len(FeedForwardSelector()(block)) == 1


def test_many_modules_take_time_in_proportion():
    """Ten thousand modules that are no block are passed in seconds, as they were not."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Linear(1, 1) for _ in range(10_000))
    start = time.process_time()
    with pytest.raises(ValueError, match="found no feed-forward block in ModuleList"):
        FeedForwardSelector()(model)

    assert time.process_time() - start < 5


def test_it_looks_at_shapes_only():
    """A model without data is selected as one with."""
    with torch.device("meta"):
        model = nn.TransformerEncoderLayer(6, 2, 10)

    assert FeedForwardSelector()(model)[0].name == "linear1.weight"


def test_a_search_with_heads_ends_with_whole_units_and_their_biases_at_zero():
    """The parts of EarlyBERT: heads and hidden units, searched and pruned together."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(8, 1))
    heads = QueryKeySelector(value=True, granularity="head")
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        model,
        heads | FeedForwardSelector(),
        scope="layer",
        window=2,
        sample_every=1,
        stopping_point=1,
    )
    x = torch.randn(4, 5, 8)
    for _ in range(2):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    opt.prune()
    model(x).square().mean().backward()
    opt.step()

    removed = ~opt.final_mask["0.linear1.weight"].any(1)
    assert removed.sum() == 6
    assert opt.final_mask["0.linear1.weight"][~removed].all()
    assert not layer.linear1.weight[removed].any()
    assert not layer.linear1.bias[removed].any()
    assert layer.linear1.bias[~removed].all()
    assert layer.linear2.weight.all()
    before = model(x)
    with torch.no_grad():
        layer.linear2.weight[:, removed] = 10
    assert model(x).equal(before)


class Between(nn.Module):
    """A block with something between its matrices, under a name of its own."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.fc1, self.between, self.fc2 = nn.Linear(8, 32), between, nn.Linear(32, 8)


@pytest.mark.parametrize(
    "between", [nn.LayerNorm(32, elementwise_affine=False), nn.GroupNorm(1, 32, affine=False)]
)
def test_a_norm_without_parameters_is_a_norm(between):
    """It makes something of a unit of zeros out of the others."""
    with pytest.raises(ValueError, match="between"):
        FeedForwardSelector()(Between(between))


def test_an_activation_is_known_by_its_class_too():
    """A sigmoid makes a half of 0; what is learned for each unit goes with it."""
    with pytest.raises(ValueError, match="Sigmoid"):
        FeedForwardSelector()(Between(nn.Sigmoid()))
    [block] = FeedForwardSelector()(Between(nn.PReLU(32)))
    assert [part.name for part in block.members] == ["fc1.weight", "fc1.bias", "between.weight"]
