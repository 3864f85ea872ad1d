"""What the query/key selection holds: proved by attention maps, and by layouts written out here."""

from __future__ import annotations

import math

import every_attention
import pytest
import torch
from attention_maps import (
    attended_values,
    attention_maps,
    judge,
    make_attentive_,
    mark_unit,
    zeroed,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torch_worm_optim import QueryKeySelector, WormOptimizer

ARCHITECTURES = [
    "bert",  # separate, with biases
    "gpt2",  # fused, transposed
    "gpt_neox",  # fused head by head
    "gpt_bigcode",  # fused, one key head for all queries
    "falcon",
    "codegen",  # fused in four parts, values before keys
    "phi3",  # fused, grouped heads
    "deepseek_v3",  # low-rank queries, latent keys and values
    "qwen3_next",  # queries with gates, and layers without a map
    "jetmoe",  # queries made by experts
    "xlnet",  # bare three-dimensional parameters
    "deberta",  # queries with a bias of their own
    "t5",  # maps that keep a bias of positions
    "axk2",  # queries fused with gates, from one latent
    "deepseek_v4",  # keys that are values too, and compressed ones
    "inkling2_text",  # projections in a wrapper
]
FURTHER = [
    "aimv2_vision_model",  # a head that pools by a learned query
    "blip_vision_model",
    "cvt",  # convolutions before the projections
    "exaone4_5_vision",  # fused, grouped heads
    "gemma4_vision",
    "granite_speech_encoder",  # keys and values fused
    "hiera",
    "imagegpt",
    "levit",  # values wider than keys
    "mgp-str",
    "sam_hq_vision_model",
    "sam_vision_model",
    "timesformer",
    "vitdet",
]


@pytest.fixture(autouse=True)
def _plain_attention():
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def auto_class(model_type):
    """What builds a model of this type."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto import modeling_auto

    if model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSequenceClassification


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers_selections_hold_all_that_attention_looks_by_and_nothing_else(model_type):
    """Maps are flat without the selection, and do not change without the rest of its matrices."""
    model = every_attention.small_transformer(model_type, auto_class(model_type))
    inputs = [{"input_ids": every_attention.tokens(seed)} for seed in (1, 2)]

    verdict = every_attention.judge_model(model, inputs)

    assert verdict.passed, verdict
    assert "mixed" not in verdict.reason  # flat without the queries, and without the keys
    assert verdict.uniform or model_type in ("t5", "deepseek_v4")
    assert verdict.n_layers >= 1


def further(name):
    """A model or a layer that the mappings of texts do not have, and what it is called with."""
    pytest.importorskip("transformers")
    if name in every_attention.LAYERS:
        return every_attention.one_layer(name), every_attention.LAYERS[name].inputs
    return every_attention.small_further(name), every_attention.FURTHER[name].inputs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FURTHER, *every_attention.LAYERS])
def test_selections_of_images_sound_and_layers(name):
    """The same for what is not called with a text, whose maps may keep a part from positions."""
    model, inputs = further(name)

    verdict = every_attention.judge_model(model, [inputs(seed) for seed in (1, 2)])

    assert verdict.passed, verdict


@pytest.mark.filterwarnings("ignore")
def test_a_token_that_is_the_only_query_is_a_bias():
    """AIMv2's pooling head has keys and values of its own; its query is learned."""
    model, _ = further("aimv2_vision_model")

    *_, last = QueryKeySelector()(model)
    *_, heads = QueryKeySelector(granularity="head")(model)

    assert last.name == "head.k_proj.weight"
    assert [part.name for part in heads.members[:2]] == ["head.k_proj.weight", "head.cls_token"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("value", [False, True])
def test_what_makes_gates_too_is_left_alone(value):
    """The first step of A.X K2's queries makes their gates as well."""
    model = every_attention.small_transformer("axk2", auto_class("axk2"))

    names = {each.name for each in QueryKeySelector(value=value)(model)}

    assert "model.layers.0.self_attn.q_gate_proj.weight" in names
    assert not any(name.endswith("q_a_proj.weight") for name in names)


def parallel_block(name, **options):
    """One of timm's blocks that fuse attention with a feed-forward layer."""
    pytest.importorskip("timm")
    from timm.models import vision_transformer

    block = getattr(vision_transformer, name)(32, 4, **options).eval()
    block.fused_attn = False
    return block, every_attention._normal(x=(2, 7, 32))


PARALLEL = ["ParallelScalingBlock", "DiffParallelScalingBlock"]


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("name", PARALLEL)
def test_rows_between_feed_forward_and_values(name, qkv_bias):
    """Of timm's fused blocks the query and key rows are taken, which lie in the middle."""
    model, inputs = parallel_block(name, qkv_bias=qkv_bias)

    verdict = every_attention.judge_model(model, [inputs(seed) for seed in (1, 2)])

    assert verdict.passed, verdict
    assert verdict.n_fused == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "aimv2_vision_model",
        "bark BarkSelfAttention",
        "blip_vision_model",
        "cvt",
        "esm.modeling_esmfold EsmFoldSelfAttention",
        "exaone4_5_vision",
        "gpt_neox",
        "granite_speech_encoder",
        "imagegpt",
        "inkling2_text",
        "qwen3_next",
        "vitdet",
        *PARALLEL,
    ],
)
def test_a_removed_head_gives_nothing(name):
    """Without its query, key and value rows the heads of a unit, and no others, are zero."""
    if name in PARALLEL:
        model, inputs = parallel_block(name, qkv_bias=True)
    elif name in (*every_attention.FURTHER, *every_attention.LAYERS):
        model, inputs = further(name)
    else:
        model, inputs = (
            every_attention.small_transformer(name, auto_class(name)),
            every_attention._text,
        )
    make_attentive_(model, 1)
    parameters = dict(model.named_parameters())
    unit, *_ = QueryKeySelector(value=True, granularity="head")(model)
    n_units = unit.n_units(parameters[unit.name])
    regions = [mark_unit(part, parameters[part.name], n_units - 1) for part in unit.members]

    before = attended_values(model, lambda: model(**inputs(1)))
    with zeroed(regions):
        after = attended_values(model, lambda: model(**inputs(1)))

    first = next(path for path in before if unit.name.startswith(path))
    (was,), (now,) = before[first][:1], after[first][:1]
    removed = (now == 0).flatten(1).all(1)
    assert (was != 0).flatten(1).any(1).all()
    assert removed.sum() * n_units == len(removed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"new_decoder_architecture": False, "multi_query": True},
        {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4},
    ],
)
def test_one_class_may_have_several_layouts(options):
    """Falcon's fused matrix is laid out by its configuration."""
    transformers = pytest.importorskip("transformers")
    config = every_attention.shrink(transformers.FalconConfig())
    for name, value in options.items():
        setattr(config, name, value)
    model = transformers.FalconForCausalLM(config).eval()

    verdict = every_attention.judge_model(
        model, [{"input_ids": every_attention.tokens(seed)} for seed in (1, 2)]
    )

    assert verdict.passed, verdict
    assert verdict.n_fused == 4


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "levit_128s", "tnt_s_legacy_patch16_224"]
)
def test_timm_selections_hold_all_that_attention_looks_by_and_nothing_else(name):
    """Blocks of equal and unequal size, head by head or not, and a matrix of queries and keys."""
    timm = pytest.importorskip("timm")
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        # Two layers of TNT are like all twelve, which take ten seconds.
        options = {"depth": 2} if name.startswith("tnt") else {}
        model = timm.create_model(name, **options).eval()
    finally:
        timm.layers.set_fused_attn(bool(fused))
    side = model.default_cfg["input_size"]
    images = [torch.randn(1, *side, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]

    verdict = every_attention.judge_model(model, [{"x": image} for image in images])

    assert verdict.passed, verdict


@pytest.mark.parametrize("granularity", ["entry", "head", "dim"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True),
        lambda: nn.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True),
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2
        ),
    ],
)
def test_torch_layers(build, granularity):
    """PyTorch's own attention, alone, stacked, and looking at what another made."""
    model = build().eval()
    make_attentive_(model)
    n_inputs = 2 if isinstance(model, nn.TransformerDecoderLayer) else 1
    inputs = torch.randn(2, n_inputs, 2, 7, 16, generator=torch.Generator().manual_seed(0))

    verdict = judge(
        model,
        lambda: model(*inputs[0]),
        lambda: model(*inputs[1]),
        QueryKeySelector(granularity=granularity),
    )

    assert verdict.passed, verdict
    assert verdict.uniform


class Fused(nn.Module):
    """Attention with a fused matrix of a layout that nobody can know."""

    def __init__(self, layout: str, n_heads: int = 3, width: int = 2) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.layout = n_heads, width, layout
        self.qkv = nn.Linear(5, 3 * n_heads * width)

    def forward(self, x):
        """Heads of (batch, position, feature)."""
        shape = (*x.shape[:-1], self.num_heads, self.head_dim)
        qkv = self.qkv(x)
        if self.layout == "num_heads * (q k v)":
            qkv = qkv.view(*x.shape[:-1], self.num_heads, 3, self.head_dim).transpose(-2, -3)
        parts = dict(
            zip(
                self.layout.strip("num_heads *()").split(),
                qkv.reshape(*x.shape[:-1], 3, -1).unbind(-2),
                strict=True,
            )
        )
        q, k, v = (parts[label].reshape(shape).transpose(-2, -3) for label in "qkv")
        return (q @ k.mT / math.sqrt(self.head_dim)).softmax(-1) @ v


@pytest.mark.parametrize("granularity", ["entry", "head", "dim"])
@pytest.mark.parametrize("layout", ["q k v", "v k q", "k v q", "num_heads * (q k v)"])
def test_a_layout_is_stated_in_one_line(layout, granularity):
    """A user's own class raises until its layout is told, and then is judged as all others."""
    model = nn.Sequential(Fused(layout), nn.Flatten(2))
    make_attentive_(model)
    inputs = torch.randn(2, 2, 7, 5, generator=torch.Generator().manual_seed(0))
    selector = QueryKeySelector(granularity=granularity, layouts={"Fused": {"qkv": layout}})

    verdict = judge(model, lambda: model(inputs[0]), lambda: model(inputs[1]), selector)

    assert verdict.passed, verdict
    assert verdict.n_fused == 1
    with pytest.raises(ValueError, match=r"'0\.qkv' of Fused, a fused matrix of shape \(18, 5\)"):
        QueryKeySelector()(model)
    wrong = {"q k v": "v q k"}.get(layout, "q k v")
    wrongly = QueryKeySelector(granularity=granularity, layouts={"Fused": {"qkv": wrong}})
    assert not judge(model, lambda: model(inputs[0]), lambda: model(inputs[1]), wrongly).passed


def test_a_layer_may_be_left_out():
    """An empty layout says that a layer has no queries and keys."""
    model = nn.ModuleList([Fused("q k v"), nn.MultiheadAttention(4, 2)])

    (only,) = QueryKeySelector(layouts={"Fused": {}})(model)

    assert only.name == "1.in_proj_weight"


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.booleans())
def test_units_are_the_rows_that_belong_together(n_groups, per_group, width, by_head, value):
    """Scores of heads and dimensions are those of query and key rows gathered one by one."""
    n_heads = n_groups * per_group
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "q_proj": nn.Linear(3, n_heads * width),
            "k_proj": nn.Linear(3, n_groups * width),
            "v_proj": nn.Linear(3, n_groups * width),
        }
    )
    model.num_heads = n_heads
    selector = QueryKeySelector(value=value, granularity="head" if by_head else "dim")
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        selector,
        sample_every=None,
        min_keep=0,
        prune_ratio=0.5,
        scope="global",
    )
    opt.sample()
    masks = opt.candidate_mask

    def rows(name, head, dims):
        return [(f"{name}.weight", head * width + dim) for dim in dims]

    units = []
    for group in range(n_groups):
        heads = range(group * per_group, (group + 1) * per_group)
        for dims in [range(width)] if by_head else [[dim] for dim in range(width)]:
            unit = [row for head in heads for row in rows("q_proj", head, dims)]
            unit += rows("k_proj", group, dims)
            if value and by_head:
                unit += rows("v_proj", group, dims)
            units.append(unit)
    if value and not by_head:
        units += [[("v_proj.weight", row)] for row in range(n_groups * width)]
    weights = dict(model.named_parameters())
    scores = [
        torch.stack([weights[name][row].abs().mean() for name, row in unit]).mean().item()
        for unit in units
    ]
    order = sorted(range(len(units)), key=lambda i: (scores[i], i))
    removed = {row for i in order[: round(0.5 * len(units))] for row in units[i]}

    for name, mask in masks.items():
        weight = name.replace("bias", "weight")  # a bias goes with its row
        for row in range(len(mask)):
            assert (~mask[row]).all() if (weight, row) in removed else mask[row].all()
    with_bias = "qkv" if value and by_head else "qk"
    names = {f"{n}_proj.weight" for n in ("qkv" if value else "qk")}
    assert masks.keys() == names | {f"{n}_proj.bias" for n in with_bias}


def test_biases_follow_their_rows():
    """Pruning a head takes its query and key biases too, and leaves those of values alone."""
    model = nn.MultiheadAttention(4, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2)
        model.in_proj_weight.view(3, 2, 2, 4)[:2, 1] = 0.5
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), 0.0),
        model,
        QueryKeySelector(granularity="head"),
        window=2,
        sample_every=None,
        stopping_point=1,
    )
    opt.sample()
    with torch.no_grad():
        model.in_proj_weight.view(3, 2, 2, 4)[:2, 1] = 1
    opt.sample()
    opt.prune()

    assert opt.final_mask.keys() == {"in_proj_weight", "in_proj_bias"}
    head = torch.tensor([[1.0, 0.0]] * 2 + [[1.0, 1.0]]) * 2
    assert model.in_proj_bias.view(3, 2, 2).equal(head[..., None].expand(3, 2, 2))
    assert model.in_proj_weight.view(3, 2, 2, 4).equal(head[..., None, None].expand(3, 2, 2, 4))


def test_no_layer_loses_its_last_head():
    """`min_keep` holds one, by default, where all heads of a layer are smaller than any other's."""
    model = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)])
    with torch.no_grad():
        for scale, layer in zip((1e-3, 1), model, strict=True):
            layer.in_proj_weight.fill_(scale)
            layer.in_proj_weight.view(3, 2, 2, 4)[:, 1] *= 2
    opt = WormOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        model,
        QueryKeySelector(granularity="head"),
        sample_every=None,
    )
    opt.sample()

    first, second = (opt.candidate_mask[f"{i}.in_proj_weight"] for i in range(2))

    kept = [
        [heads[:2].all().item() for heads in mask.view(3, 2, 2, 4).unbind(1)]
        for mask in (first, second)
    ]
    assert kept == [[False, True], [False, True]]


class Bare(nn.ModuleDict):
    """Projections and nothing that tells of heads."""


def bare(q=6, k=6, **attributes):
    """An attention layer of these widths."""
    layers = {"q_proj": nn.Linear(3, q), "k_proj": nn.Linear(3, k), "v_proj": nn.Linear(3, k)}
    model = nn.ModuleDict({"attn": Bare(layers)})
    for name, value in attributes.items():
        setattr(model["attn"], name, value)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            bare(),
            {"granularity": "head"},
            r"'attn' \(Bare\) does not tell how many heads .*\(6, 3\)",
        ),
        (bare(num_heads=4), {"granularity": "dim"}, "4 heads do not divide the 6 query rows"),
        (
            bare(head_dim=4),
            {"granularity": "dim"},
            r"'q_proj\.weight' of 'attn' \(Bare\) has shape",
        ),
        (bare(6, 4, head_dim=2), {"granularity": "dim"}, "cannot be cut into 2 equal groups"),
        (bare(6, 4, head_dim=2), {"granularity": "head"}, "cannot be cut into 2 equal groups"),
        (
            nn.ModuleDict(
                {n: nn.Linear(4, 4) for n in ("q_a_proj", "q_b_proj")}
                | {"kv_a_proj_with_mqa": nn.Linear(4, 4), "kv_b_proj": nn.Linear(2, 8)}
            ),
            {"granularity": "dim"},
            "does not fit 'kv_a_proj_with_mqa.weight'.*no integer|neither it nor its config",
        ),
        (
            nn.ModuleDict({"swiglu": nn.Linear(2, 2)}),
            {},
            "no query and key weights in ModuleDict",
        ),
        (
            Fused("q k v"),
            {"layouts": {"Fused": {"qkv": "q=7 k v"}}},
            r"'q=7 k v' does not fit 'qkv\.weight'.*\(18, 5\).*18 output features cannot be cut",
        ),
        (
            Fused("q k v"),
            {"layouts": {"Fused": {"qkv": "n_kv * (q k v)"}}},
            "neither it nor its config has an integer 'n_kv'",
        ),
        (Fused("q k v"), {"layouts": {"Fused": {"qkv": "(q k v"}}}, "a layout reads"),
    ],
)
def test_what_cannot_be_selected_says_why_and_what_to_pass(model, options, message):
    """The module's name, its shape, and the way out."""
    with pytest.raises(ValueError, match=message):
        QueryKeySelector(**options)(model)


def test_latent_attention_has_no_heads_to_rank():
    """Queries and keys that are made in two steps have no pairing by rows."""
    layers = {
        "q_proj": nn.Linear(4, 2 * (3 + 2)),
        "kv_a_proj_with_mqa": nn.Linear(4, 6 + 2),
        "kv_b_proj": nn.Linear(6, 2 * (3 + 5)),
    }
    model = Bare(layers)
    for name, value in {
        "num_heads": 2,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
    }.items():
        setattr(model, name, value)

    q, rope, nope = (each.parts[0] for each in QueryKeySelector()(model))

    weights = dict(model.named_parameters())
    assert q.entries(weights[q.name]).shape == (10, 4)
    assert rope.entries(weights[rope.name]).equal(weights["kv_a_proj_with_mqa.weight"][6:])
    keys = weights["kv_b_proj.weight"].view(2, 8, 6)[:, :3]
    assert nope.entries(weights[nope.name]).equal(keys)
    with pytest.raises(ValueError, match=r"no pairing by rows.*granularity=\"entry\""):
        QueryKeySelector(granularity="dim")(model)


def test_maps_are_recorded_of_every_way_to_attend():
    """The recorder sees softmax, scaled_dot_product_attention and MultiheadAttention alike."""

    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            F.scaled_dot_product_attention(x, x, x)
            torch.softmax(x @ x.mT, -1)
            torch.softmax(x, 1)  # not over the last dimension: no map
            return self.mha(x, x, x, need_weights=False)

    model = Ways().eval()
    x = torch.randn(1, 3, 4)

    maps = attention_maps(model, lambda: model(x))

    assert {path: len(found) for path, found in maps.items()} == {"": 2, "mha": 1}
    torch.testing.assert_close(maps[""][0].squeeze(1), (x @ x.mT / 2).softmax(-1))
