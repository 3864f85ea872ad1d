"""Which parameters selectors name, and what happens to selections that cannot work."""

from __future__ import annotations

import itertools
import re
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from training import small_cnn

from torch_worm_optim import (
    BatchNormSelector,
    FeedForwardSelector,
    ParameterSelector,
    Part,
    QueryKeySelector,
    Representative,
    Selector,
    WormOptimizer,
)
from torch_worm_optim.distributed import canonical_name
from torch_worm_optim.selectors import default_selector

PREFIXES = ["module.", "_orig_mod.", "_checkpoint_wrapped_module."]


def names(selector, model):
    """What a selector names, in order."""
    return [representative.name for representative in selector(model)]


class Block(nn.Module):
    """All kinds of BatchNorm and InstanceNorm, with and without scales, and other norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.BatchNorm1d(2)
        self.two = nn.BatchNorm2d(2)
        self.three = nn.BatchNorm3d(2)
        self.sync = nn.SyncBatchNorm(2)
        self.plain = nn.BatchNorm2d(2, affine=False)
        self.instance = nn.InstanceNorm2d(2, affine=True)
        self.running = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
        self.plain_instance = nn.InstanceNorm3d(2)
        self.group = nn.GroupNorm(1, 2)
        self.layer = nn.LayerNorm(2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_kind_of_batchnorm_with_a_scale_is_selected(device, bias):
    """InstanceNorms are too; other norms and scales that are not there are not."""
    selected = BatchNormSelector(bias=bias)(Block().to(device))

    kinds = ("one", "two", "three", "sync", "instance", "running")
    assert selected == [
        Representative(f"{kind}.weight", (f"{kind}.bias",) if bias else ()) for kind in kinds
    ]


def test_a_scale_shared_by_two_layers_is_selected_once():
    """Tied parameters and modules that are used twice count once."""
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(2)})
    model["b"].weight = model["a"].weight
    model["again"] = model["a"]

    assert BatchNormSelector()(model) == [Representative("a.weight", ("a.bias", "b.bias"))]

    shared_shift = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    shared_shift[1].bias = shared_shift[0].bias
    assert BatchNormSelector()(shared_shift) == [
        Representative("0.weight", ("0.bias",)),
        Representative("1.weight"),
    ]


def test_parameters_are_selected_by_glob_regex_or_predicate():
    """In the order of named_parameters(), by the names of the bare model."""
    model = small_cnn()

    assert names(ParameterSelector("?.bias"), model) == ["1.bias", "4.bias", "8.bias"]
    assert names(ParameterSelector(re.compile(r"[13]\.weight")), model) == ["1.weight", "3.weight"]
    assert names(ParameterSelector(lambda name, p: p.ndim == 4), model) == ["0.weight", "3.weight"]
    assert names(ParameterSelector(re.compile("weight|1")), nn.Linear(1, 1)) == ["weight"]
    with pytest.raises(ValueError, match=r"no parameter of Sequential.*0\.weight, 1\.weight"):
        ParameterSelector("encoder.*")(model)
    with pytest.raises(TypeError, match="a glob string, a compiled regular expression"):
        ParameterSelector(3)


def test_a_regular_expression_must_match_the_whole_name():
    """Part of a name is another layer's whole one."""
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(11)])

    assert names(ParameterSelector(re.compile(r"0\.weight")), model) == ["0.weight"]
    for part in (r"\d", "weight", r"0\.weigh"):
        with pytest.raises(ValueError, match="matched no parameter"):
            ParameterSelector(re.compile(part))(model)


@given(st.lists(st.sampled_from(PREFIXES), max_size=3), st.sampled_from(["a.weight", "w"]))
def test_names_lose_what_wrappers_add_and_nothing_else(prefixes, name):
    """Any stack of wrapper prefixes in front of a name is taken off."""
    assert canonical_name("".join(prefixes) + name) == name
    assert canonical_name(f"layer._orig_mod.{name}") == f"layer.{name}"
    assert canonical_name(f"submodule.module.{name}") == f"submodule.module.{name}"


def test_a_pattern_matches_through_a_wrapper():
    """`module.` in front of every name does not hide a parameter, and is kept in what is named."""
    model = nn.Sequential()
    model.add_module("module", small_cnn())

    assert names(ParameterSelector("1.*"), model) == ["module.1.weight", "module.1.bias"]
    assert names(ParameterSelector(lambda name, _: name == "1.bias"), model) == ["module.1.bias"]
    assert names(ParameterSelector("module.1.*"), model) == ["module.1.weight", "module.1.bias"]


def test_selectors_join():
    """`|` takes the first selection and then the second; either side may be a plain function."""

    def head(model):
        return [Representative("8.weight")]

    model = small_cnn()
    joined = head | BatchNormSelector() | ParameterSelector("0.*")

    assert names(joined, model) == ["8.weight", "1.weight", "4.weight", "0.weight"]
    assert names(BatchNormSelector() | head, model) == ["1.weight", "4.weight", "8.weight"]
    assert isinstance(joined, Selector)
    with pytest.raises(TypeError, match=r"Each side of `\|` must be"):
        BatchNormSelector() | "8.weight"


@pytest.mark.parametrize(
    ("joined", "way"),
    [
        (
            lambda one: one | "*.weight",
            r"such as ParameterSelector\('\*\.weight'\), got '\*\.weight'",
        ),
        (lambda one: "1.bias" | one, r"such as ParameterSelector\('1\.bias'\), got '1\.bias'"),
        (
            lambda one: one | QueryKeySelector,
            r"such as QueryKeySelector\(\), an object of the class",
        ),
        (
            lambda one: QueryKeySelector | one,
            r"such as QueryKeySelector\(\), an object of the class",
        ),
    ],
)
def test_what_is_no_selector_is_no_side_of_a_union(joined, way):
    """The error says what to write, as that of `selector=` does."""
    with pytest.raises(TypeError, match=r"Each side of `\|` must be a callable .* " + way):
        joined(BatchNormSelector())


def test_a_ticket_that_is_given_takes_no_class_for_a_selector():
    """Nor a string."""
    model, ticket = small_cnn(), {"1.weight": torch.ones(8, dtype=torch.bool)}
    for wrong in (BatchNormSelector, "*.weight"):
        with pytest.raises(TypeError, match=r"`selector` must be a callable .* such as \w+\("):
            WormOptimizer(torch.optim.SGD(model.parameters()), model, wrong, ticket=ticket)


def test_the_default_takes_scales_before_queries_and_keys():
    """BatchNorm if there is any, else attention, else an error that says what to pass."""
    attention = nn.MultiheadAttention(4, 2)

    assert names(default_selector, nn.ModuleList([attention, nn.BatchNorm1d(4)])) == ["1.weight"]
    assert names(default_selector, attention) == ["in_proj_weight"]
    translator = nn.ModuleList([attention, nn.InstanceNorm2d(4, affine=True)])
    assert names(default_selector, translator) == ["1.weight"]


class Gain(nn.Module):
    """One vector, and a name that no selector knows."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(4))


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision and detectron2: what BatchNorm trains are buffers."""

    def __init__(self, n_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(n_features))


ADVICE = {  # by model: what each line of the advice selects, in order
    "LSTM": (lambda: nn.LSTM(3, 4), [["weight_hh_l0"], ["weight_ih_l0", "weight_hh_l0"]]),
    "GRU, two ways": (
        lambda: nn.ModuleList([nn.GRU(3, 4, bidirectional=True), nn.ReLU()]),
        [
            ["0.weight_hh_l0", "0.weight_hh_l0_reverse"],
            [f"0.weight_{which}" for which in ("ih_l0", "hh_l0", "ih_l0_reverse", "hh_l0_reverse")],
        ],
    ),
    "RNNCell, LayerNorm": (
        lambda: nn.ModuleList([nn.RNNCell(3, 4), nn.LayerNorm(4)]),
        [["0.weight_hh"], ["1.weight"], ["0.weight_ih", "0.weight_hh"]],
    ),
    "GroupNorm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)),
        [["1.weight"], ["0.weight", "2.weight"]],
    ),
    "a head on what is frozen": (
        lambda: nn.ModuleList(
            [nn.GRU(3, 4).requires_grad_(False), nn.LayerNorm(4), nn.Embedding(2, 2)]
        ),
        [["1.weight"], ["0.weight_ih_l0", "0.weight_hh_l0", "2.weight"]],
    ),
    "LayerNorm over a plane": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.LayerNorm((4, 6, 6), bias=False)),
        [["0.weight", "1.weight"]],
    ),
    "FrozenBatchNorm": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), FrozenBatchNorm2d(4), nn.Linear(4, 2)),
        [["0.weight", "2.weight"]],
    ),
    "Linear": (lambda: nn.Linear(4, 2), [["weight"]]),
    "vector": (Gain, [["gain"]]),
}


@pytest.mark.parametrize("kind", ADVICE)
def test_where_the_default_finds_nothing_each_line_of_advice_works_as_typed(kind):
    """The error names what the model has; evaluated as it stands, it ranks just that."""
    make, selected = ADVICE[kind]
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # scales that are all 1 would tie
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"{type(model).__name__} has neither BatchNorm") as error:
        WormOptimizer(sgd, model)
    message = str(error.value)

    assert ("Scales of FrozenBatchNorm2d are buffers" in message) == (kind == "FrozenBatchNorm")
    lines = re.findall(r"^- .*: selector=(.*)$", message, re.MULTILINE)
    assert [names(eval(line), model) for line in lines] == selected
    for line in lines:
        opt = WormOptimizer(sgd, model, selector=eval(line), sample_every=None)
        opt.sample()
        masks = torch.cat([mask.flatten() for mask in opt.candidate_mask.values()])
        assert masks.sum() == len(masks) - round(len(masks) / 2)


def test_a_selector_that_finds_nothing_sends_to_the_advice():
    """None of them recommends by itself what may not be there either."""
    for selector in (BatchNormSelector(), QueryKeySelector(), lambda _: []):
        with pytest.raises(ValueError, match=r"found no.* in Linear.*Leave out `selector=`"):
            wrap(selector, nn.Linear(2, 2))


@pytest.mark.parametrize(
    "projections",
    ["query key value", "q_proj k_proj v_proj", "q_lin k_lin v_lin", "to_q to_k to_v", "q k v"],
)
def test_separate_projections_are_known_by_their_names(projections):
    """What the libraries call them; a lone `q` without the others is not attention."""
    layers = {name: nn.Linear(4, 4) for name in projections.split()}
    query, key, value = (f"{name}.weight" for name in layers)

    assert names(QueryKeySelector(), nn.ModuleDict(layers)) == [query, key]
    assert names(QueryKeySelector(value=True), nn.ModuleDict(layers)) == [query, key, value]
    layers.popitem()
    with pytest.raises(ValueError, match="no query and key weights"):
        QueryKeySelector()(nn.ModuleDict(layers))


def test_keys_that_are_read_as_values_are_keys():
    """A layer whose value projection is None has queries and keys all the same."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4), None

    assert names(QueryKeySelector(), Shared()) == ["q_proj.weight", "k_proj.weight"]
    assert names(QueryKeySelector(value=True), Shared()) == ["q_proj.weight", "k_proj.weight"]


@pytest.mark.parametrize(
    "name", ["qkv", "qkv_proj", "Wqkv", "query_key_value", "c_attn", "to_qkv", "kv", "qk"]
)
def test_fused_projections_are_known_by_their_names(name):
    """Each common name of a fused matrix raises, and does not pass for a plain layer."""
    with pytest.raises(ValueError, match=f"'{name}' of ModuleDict"):
        QueryKeySelector()(nn.ModuleDict({name: nn.Linear(4, 12)}))


def test_an_in_projection_is_fused_in_attention_only():
    """State space layers have an `in_proj` as well, of something else."""

    class SelfAttention(nn.ModuleDict):
        pass

    with pytest.raises(ValueError, match="'in_proj' of SelfAttention"):
        QueryKeySelector()(SelfAttention({"in_proj": nn.Linear(4, 12)}))
    own = SelfAttention()
    own.in_proj_weight = nn.Parameter(torch.zeros(12, 4))
    with pytest.raises(ValueError, match=r"'in_proj_weight' of SelfAttention.*\(12, 4\)"):
        QueryKeySelector()(own)
    with pytest.raises(ValueError, match="no query and key weights"):
        QueryKeySelector()(nn.ModuleDict({"in_proj": nn.Linear(4, 12)}))


def test_a_computed_projection_is_refused():
    """A parametrised weight is no parameter; the error says to name what it is computed from."""
    layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key", "value")})
    torch.nn.utils.parametrizations.weight_norm(layers["query"])
    model = nn.ModuleDict({"attn": layers})

    with pytest.raises(ValueError, match=r"'query.weight' of 'attn' .* is computed from other"):
        QueryKeySelector()(model)


def test_a_computed_value_projection_is_nobodys_business():
    """Values are not selected unless asked for, and so may be computed from what they like."""
    layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("query", "key", "value")})
    torch.nn.utils.parametrizations.weight_norm(layers["value"])

    assert names(QueryKeySelector(), layers) == ["query.weight", "key.weight"]
    with pytest.raises(ValueError, match=r"'value\.weight' of .* is computed"):
        QueryKeySelector(value=True)(layers)


def test_layers_without_a_map_are_no_attention():
    """A fused matrix of linear attention is neither selected nor reason for an error."""

    class SomeLightningAttention(nn.ModuleDict):
        pass

    model = nn.ModuleList([SomeLightningAttention({"qkv_proj": nn.Linear(4, 12)})])

    with pytest.raises(ValueError, match="no query and key weights"):
        QueryKeySelector()(model)
    with pytest.raises(ValueError, match="has neither BatchNorm scales nor attention"):
        default_selector(model)


def test_layers_that_are_taken_for_layers_without_a_map_are_named(caplog):
    """A class is passed over for its name; a line says so, and that it can be stated."""

    class ConvLSTMAttention(nn.ModuleDict):
        pass

    layers = {name: nn.Linear(4, 4) for name in ("q", "k", "v")}
    model = nn.ModuleDict(
        {"odd": ConvLSTMAttention(layers), "plain": nn.ModuleDict(layers), "lstm": nn.LSTM(2, 2)}
    )
    layouts = {"ConvLSTMAttention": {name: name for name in layers}}
    with caplog.at_level("INFO", "torch_worm_optim"):
        QueryKeySelector()(model)
        QueryKeySelector(layouts=layouts)(model)
        QueryKeySelector(layouts={"ConvLSTMAttention": {}})(model)

    [line] = caplog.messages
    assert "leaves out ConvLSTMAttention, 'odd' for one" in line
    assert 'layouts={"ConvLSTMAttention": {...}}' in line


def test_queries_and_keys_of_known_layouts():
    """Separate projections and MultiheadAttention, values left out unless asked for."""
    block = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("q_proj", "k_proj", "v_proj", "o_proj")})
    model = nn.ModuleDict({"attn": block, "mha": nn.MultiheadAttention(4, 2, kdim=3, vdim=5)})

    assert names(QueryKeySelector(), model) == [
        "attn.q_proj.weight",
        "attn.k_proj.weight",
        "mha.q_proj_weight",
        "mha.k_proj_weight",
    ]
    assert len(names(QueryKeySelector(value=True), model)) == 6
    (fused,) = QueryKeySelector(value=True)(nn.MultiheadAttention(4, 2))
    assert fused == Representative("in_proj_weight")


def test_a_fused_layout_that_is_not_known_is_not_guessed():
    """The error names the module and its shape, and how to state the layout."""
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(4, 12)})})

    with pytest.raises(
        ValueError,
        match=r"'attn\.qkv' of ModuleDict.*\(12, 4\).*\{\"ModuleDict\": \{\"qkv\": \"q k v\"\}\}",
    ):
        QueryKeySelector()(model)
    with pytest.raises(ValueError, match=r"'attn\.qkv'"):
        default_selector(model)


def test_rows_are_units():
    """`granularity="row"` ranks filters by their mean magnitude; the mask holds them whole."""
    model = small_cnn()
    selector = ParameterSelector("[03].weight", granularity="row")
    opt = wrap(selector, model, scope="global")
    opt.sample()

    rows = {
        n: model.get_parameter(n).detach().abs().mean((1, 2, 3)) for n in ("0.weight", "3.weight")
    }
    scores = torch.cat(list(rows.values()))
    removed = scores.argsort()[: len(scores) // 2]
    for name, start in (("0.weight", 0), ("3.weight", len(rows["0.weight"]))):
        mask = opt.candidate_mask[name]
        assert mask.shape == model.get_parameter(name).shape
        for row in range(len(mask)):
            assert mask[row].any() == mask[row].all() == (start + row not in removed)
    with pytest.raises(ValueError, match="'entry', 'row', got 'filter'"):
        ParameterSelector("*", granularity="filter")
    scalar = nn.Module()
    scalar.w = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"'w' is a scalar of shape \(\) and has no rows"):
        ParameterSelector("w", granularity="row")(scalar)


class Conv1D(nn.Module):
    """As GPT-2's: a linear layer whose first dimension is that of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = (
            4,
            nn.Parameter(torch.ones(4, 4)),
            nn.Parameter(torch.ones(4)),
        )


BIASES = {  # by layer: which bias the rows of which weight take along
    "linear": (lambda: nn.Linear(4, 4), {"weight": "bias"}),
    "without": (lambda: nn.Linear(4, 4, bias=False), {"weight": None}),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), {"weight": "bias"}),
    "transposed": (lambda: nn.ConvTranspose1d(4, 4, 3), {"weight": None}),
    "Conv1D": (Conv1D, {"weight": None}),
    "norm": (lambda: nn.GroupNorm(1, 4), {"weight": "bias"}),
    "embedding": (lambda: nn.Embedding(4, 4), {"weight": None}),
    "recurrent": (lambda: nn.GRU(4, 4), {"weight_ih_l0": None, "weight_hh_l0": None}),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2),
        {"in_proj_weight": "in_proj_bias", "out_proj.weight": "out_proj.bias"},
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Conv1d(2, 4, 3)),
        {"parametrizations.weight.original0": "bias", "parametrizations.weight.original1": None},
    ),
    "spectral norm": (lambda: spectral_norm(nn.Conv1d(2, 4, 3)), {"weight_orig": "bias"}),
}


@pytest.mark.parametrize("kind", BIASES)
@pytest.mark.parametrize("path", ["", "inner."])
def test_the_bias_of_rows_follows_them(kind, path):
    """Where the first dimension of a weight is that of the bias, and nothing else is added."""
    make, biases = BIASES[kind]
    model = nn.ModuleDict({"inner": make()}) if path else make()

    def which(name, parameter):
        return "bias" not in name

    for granularity in ("entry", "row"):
        found = {
            each.name.removeprefix(path): tuple(part.name for part in each.followers)
            for each in ParameterSelector(which, granularity=granularity)(model)
        }
        follow = granularity == "row"
        assert found == {n: (path + b,) if b and follow else () for n, b in biases.items()}


def test_a_bias_that_matches_or_is_shared_follows_once():
    """It is ranked by itself, or follows the first of the weights that it belongs to."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    both = ParameterSelector("*", granularity="row")(model)
    assert [each.name for each in both] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not any(each.followers for each in both)
    model[2].bias = model[0].bias

    first, second = ParameterSelector("*.weight", granularity="row")(model)

    assert [part.name for part in first.followers] == ["0.bias"]
    assert second.followers == ()
    wrap(ParameterSelector("*.weight", granularity="row"), model)


def test_layers_that_were_compiled_have_no_kinds():
    """What is around them is selected, and their parameters can be named."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    attention = nn.MultiheadAttention(4, 2)
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    model = nn.ModuleList([compiled, attention, layer])

    assert names(default_selector, model) == ["1.in_proj_weight", "2.self_attn.in_proj_weight"]
    assert names(FeedForwardSelector(), model) == ["2.linear1.weight"]
    opt = wrap(ParameterSelector("0.*.weight"), model, scope="global")
    opt.sample()
    opt.prune(force=True)
    assert compiled[0].weight.eq(0).any()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *itertools.product(
            [nn.RNN, nn.LSTM, nn.GRU],
            [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}],
        ),
        (nn.LSTM, {"proj_size": 2}),
    ],
)
def test_recurrent_networks_forget_without_what_a_pattern_selects(kind, options):
    """Without them a unit sees of the last hidden state nothing, or only itself (as GRUs do)."""
    torch.manual_seed(0)
    layer = kind(3, 4, **options)
    model = nn.ModuleDict({"layer": layer, "again": layer})

    selected = ParameterSelector("*weight_hh*")(model)

    n_states = layer.num_layers * (2 if layer.bidirectional else 1)
    assert len(selected) == n_states
    x = torch.randn(1, 1, 3)
    width = layer.proj_size or layer.hidden_size

    def last_hidden(h):
        h = h.view(n_states, 1, width)
        states = (h, torch.ones(n_states, 1, 4)) if kind is nn.LSTM else h
        end = layer(x, states)[1]
        return (end[0] if kind is nn.LSTM else end).flatten()

    # How much each layer's next state changes with its last one.
    at = torch.randn(n_states * width)
    blocks = [slice(i * width, (i + 1) * width) for i in range(n_states)]

    def seen():
        whole = torch.autograd.functional.jacobian(last_hidden, at)
        own = [whole[block, block] for block in blocks]
        return [each - each.diag().diag() if kind is nn.GRU else each for each in own]

    assert all(each.abs().max() > 1e-3 for each in seen())
    with torch.no_grad():
        for each in selected:
            model.get_parameter(each.name).zero_()
    assert not any(each.any() for each in seen())
    assert any(parameter.any() for name, parameter in model.named_parameters() if "_ih" in name)


def test_the_pattern_selects_recurrent_cells_too():
    """One weight each; a cell that is shared counts once."""
    cell = nn.GRUCell(3, 4)
    cells = nn.ModuleList([nn.RNNCell(3, 4), nn.LSTMCell(3, 4), cell, cell])

    assert names(ParameterSelector("*weight_hh*"), cells) == [f"{i}.weight_hh" for i in range(3)]


@pytest.mark.parametrize(
    ("short", "long", "text"),
    [
        (Representative("a"), Representative((Part("a"),), (), 0), "Representative('a')"),
        (
            Representative("a", "b"),
            Representative([Part("a")], [Part("b")]),
            "Representative('a', followers=('b',))",
        ),
        (
            Representative(Part("a", index=(slice(0, 2),), units=(2,)), ("b", Part("c"))),
            Representative(
                (Part("a", (), (slice(0, 2),), (2,)),),
                (Part("b", index=(slice(0, 2),), units=(2,)), Part("c")),
            ),
            "Representative(Part('a', index=(slice(0, 2),), units=(2,)), "
            "followers=('b', Part('c')))",
        ),
        (
            Representative(("a", Part("b", view=(2, 3), index=(slice(None),)))),
            Representative((Part("a"), Part("b", (2, 3), (slice(None),)))),
            "Representative(('a', Part('b', view=(2, 3), index=(slice(None),))))",
        ),
    ],
)
def test_names_stand_for_parts(short, long, text):
    """What is written short is the same, and is shown as short."""
    assert short == long
    assert short.members == (*short.parts, *short.followers)
    assert repr(long) == text
    assert eval(text, {"Part": Part, "Representative": Representative}) == long


def test_entries_and_rows_can_be_the_same_units():
    """Only the number of units must agree: a bias is as many entries as its weight has rows."""
    model = nn.Linear(3, 4)
    neurons = Representative((Part("weight", units=(4,)), Part("bias")))
    opt = wrap(lambda _: [neurons], model)
    opt.sample()

    score = (model.weight.abs().sum(1) + model.bias.abs()) / 4
    kept = score >= score.median()
    kept[score.argsort()[1]] = False  # the median is the lower one of two
    assert opt.candidate_mask["bias"].equal(kept)
    assert opt.candidate_mask["weight"].equal(kept[:, None].expand(4, 3))


def wrap(selector, model=None, parameters=None, **options):
    """A WormOptimizer over a small network with this selector."""
    model = small_cnn() if model is None else model
    parameters = model.parameters() if parameters is None else parameters
    return WormOptimizer(torch.optim.SGD(parameters, lr=0.1), model, selector, **options)


@pytest.mark.parametrize(
    ("selector", "error", "message"),
    [
        (
            "*.weight",
            TypeError,
            r"`selector` must be a callable.* such as ParameterSelector\('\*\.weight'\), got '\*",
        ),
        ("", TypeError, r"such as ParameterSelector\(''\), got ''"),
        (["1.weight"], TypeError, r"such as BatchNormSelector\(\), got \['1.weight'\]"),
        (BatchNormSelector, TypeError, r"such as BatchNormSelector\(\), an object of the class"),
        (QueryKeySelector, TypeError, r"such as QueryKeySelector\(\), an object of the class"),
        (lambda model: [], ValueError, "found nothing in Sequential"),
        (lambda model: ["1.weight"], TypeError, "list of Representative, got '1.weight' in it"),
        (lambda model: [Representative("1.wieght")], ValueError, r"Did you mean '1\.weight'"),
        (
            lambda model: [Representative("1.weight", ("1.gias",))],
            ValueError,
            r"no parameter '1\.gias'",
        ),
        (
            BatchNormSelector() | ParameterSelector("1.weight"),
            ValueError,
            r"'1\.weight' is selected twice",
        ),
        (
            BatchNormSelector() | ParameterSelector("1.bias"),
            ValueError,
            r"'1\.bias' is selected twice",
        ),
        (
            lambda model: [Representative("0.weight", ("1.bias",))],
            ValueError,
            r"'1\.bias' of shape \(8,\) has 8 units, but '0\.weight'.* has 72\. State the units",
        ),
        (
            lambda model: [Representative(Part("1.weight", index=(slice(8, 9),)))],
            ValueError,
            r"'1\.weight' has shape \(8,\), which .* does not fit",
        ),
        (
            lambda model: [Representative(Part("1.weight", view=(3, 2)))],
            ValueError,
            r"'1\.weight' has shape \(8,\), which .*view=\(3, 2\).* does not fit",
        ),
        *[
            (
                lambda model, index=index: [Representative(Part("0.weight", index=index))],
                ValueError,
                r"'0\.weight' has shape .* does not fit",
            )
            for index in (
                (slice(0, 9),),  # past the end of 8 rows
                (slice(2, 2),),
                (slice(-2, None),),  # as many rows as they say, but counted from the other end
                (slice(0, 0),),
                ([0, 1],),  # a copy, not a view
                (slice(None),) * 5,
            )
        ],
        (
            lambda model: [Representative("1.weight", ("1.weight",))],
            ValueError,
            r"'1\.weight' is selected twice\. Name",
        ),
        (QueryKeySelector(), ValueError, "no query and key weights in Sequential"),
        (
            lambda model: [Representative(Part("0.weight", units=(3,)))],
            ValueError,
            r"have shape \(8, 1, 3, 3\): `units` says .* they must divide",
        ),
        (
            lambda model: [Representative(Part("1.weight", units=(1, 1)))],
            ValueError,
            r"have shape \(8,\): `units` says",
        ),
        (
            lambda model: [
                Representative((Part("0.weight", units=(8,)), Part("3.weight", units=(4,))))
            ],
            ValueError,
            r"has 4 units, but '0\.weight', which it goes with, has 8\. State",
        ),
        (lambda model: [Representative(())], ValueError, "needs something to rank"),
        (
            lambda model: [Representative("0.weight", (Representative("1.weight"),))],
            TypeError,
            r"a parameter's name or a `Part`, got Representative\('1\.weight'\)",
        ),
        (
            lambda model: [
                Representative(Part("0.weight", index=(slice(0, 4),))),
                Representative(Part("0.weight", index=(slice(3, 8),))),
            ],
            ValueError,
            r"'0\.weight' is selected twice\. Name each entry once",
        ),
    ],
)
def test_selections_that_cannot_work_are_refused(selector, error, message):
    """Each says what is wrong with which parameter; model and base optimizer stay as they were."""
    model = small_cnn()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    before = base.state_dict()

    with pytest.raises(error, match=message):
        WormOptimizer(base, model, selector)

    assert before == base.state_dict()


def test_parameters_of_another_optimizer_are_refused():
    """A representative or a follower that the base does not own is named."""
    model = small_cnn()
    scales = [parameter for name, parameter in model.named_parameters() if "bias" not in name]

    with pytest.raises(ValueError, match=r"does not own '4\.weight'"):
        wrap(None, model, parameters=model[:4].parameters())
    with pytest.raises(ValueError, match=r"does not own '1\.bias'"):
        wrap(None, model, parameters=scales)
    wrap(BatchNormSelector(bias=False), model, parameters=scales)


def test_one_parameter_under_two_names_is_refused():
    """Tied weights are one parameter, and would be counted twice."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    both = lambda _: [Representative("0.weight"), Representative("1.weight")]  # noqa: E731

    with pytest.raises(ValueError, match=r"selected twice \(as '0\.weight' and '1\.weight'"):
        wrap(both, model)


def test_parameters_without_shape_or_magnitude_are_refused():
    """Lazy parameters have no entries yet; integers have no gradient."""
    lazy = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(RuntimeError, match=r"'0\.weight' has no shape yet: run one batch"):
        wrap(None, lazy)
    whole = nn.Module()
    whole.weight = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match=r"'weight' is of torch\.int64"):
        WormOptimizer(torch.optim.SGD([whole.weight]), whole, ParameterSelector("weight"))


@pytest.mark.parametrize("mark", ["_fsdp_flattened", "ds_id"])
def test_parameters_that_engines_hide_are_refused_at_construction_and_at_samples(mark):
    """What FSDP1 and ZeRO-3 leave in the module says nothing of where entries are."""
    model = small_cnn()
    opt = wrap(None, model)
    setattr(model[4].weight, mark, True)

    for attempt in (opt.sample, lambda: wrap(None, model)):
        with pytest.raises(RuntimeError, match=r"'4\.weight' is sharded by FSDP1"):
            attempt()
    assert opt.history == []
