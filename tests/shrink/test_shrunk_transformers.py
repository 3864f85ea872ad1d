"""Heads and feed-forward rows cut out: what a transformer computes stays the same."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from every_shrunk_transformer import scatter_weights_, zero_units
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_worm_optim import FeedForwardSelector, QueryKeySelector, Representative, WormOptimizer
from torch_worm_optim.selectors import select
from torch_worm_optim.shrink import load_shrunk_, shrink_

HEADS = QueryKeySelector(
    value=True,
    granularity="head",
    layouts={
        "Fused": {"qkv": "q k v"},
        "ByHead": {"query_key_value": "num_heads * (q k v)"},
    },
)
WIDTH, HEAD_DIM, N_HIDDEN = 24, 4, 20


def attend(q: Tensor, k: Tensor, v: Tensor, fused: bool) -> Tensor:
    """Attention, by torch's function or by hand."""
    if fused:
        return nn.functional.scaled_dot_product_attention(q, k, v)
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class Separate(nn.Module):
    """Queries, keys and values apart, as BERT has them; heads are split and joined by -1."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_attention_heads, self.all_head_size, self.fused = 6, 24, fused
        self.query, self.key, self.value = (nn.Linear(WIDTH, 24) for _ in range(3))
        self.out = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q, k, v = (
            layer(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = attend(q, k, v, self.fused).transpose(1, 2)
        return self.out(y.reshape(*x.shape[:2], self.all_head_size))


class Fused(nn.Module):
    """One matrix, block after block, as timm has it; heads are split by a number."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.attn_dim, self.fused = 6, 24, fused
        self.qkv, self.proj = nn.Linear(WIDTH, 72, bias=False), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, HEAD_DIM).permute(2, 0, 3, 1, 4)
        y = attend(*qkv.unbind(0), self.fused)
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))


class ByHead(nn.Module):
    """One matrix, head by head, as GPT-NeoX has it."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = 6, fused
        self.query_key_value, self.dense = nn.Linear(WIDTH, 72), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        mixed = self.query_key_value(x).view(*x.shape[:2], -1, 3 * HEAD_DIM).transpose(1, 2)
        y = attend(*mixed.chunk(3, dim=-1), self.fused)
        return self.dense(y.transpose(1, 2).flatten(2))


class Grouped(nn.Module):
    """Two query heads for each key head, turned by position as Llama's are; no biases."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.fused = 6, 3, fused
        self.q_proj = nn.Linear(WIDTH, 24, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, 12, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        q = self.q_proj(x).view(*x.shape[:2], self.num_heads, HEAD_DIM).transpose(1, 2)
        k, v = (
            layer(x).view(*x.shape[:2], self.num_key_value_heads, HEAD_DIM).transpose(1, 2)
            for layer in (self.k_proj, self.v_proj)
        )
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        q, k = (
            each * angles.cos() + torch.cat([-each[..., 2:], each[..., :2]], -1) * angles.sin()
            for each in (q, k)
        )
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        y = attend(q, k, v, self.fused).transpose(1, 2)
        return self.o_proj(y.reshape(*x.shape[:2], -1))


class Gated(nn.Module):
    """A feed-forward block with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, N_HIDDEN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(N_HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """A feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, N_HIDDEN), nn.GELU(), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Transform."""
        return self.fc2(self.act(self.fc1(x)))


class Transformer(nn.Module):
    """Two layers of an attention and a feed-forward block around a residual stream."""

    def __init__(self, attention: type[nn.Module], fused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(WIDTH),
                    "attention": attention(fused),
                    "norm2": nn.LayerNorm(WIDTH),
                    "mlp": Gated() if attention is Grouped else Plain(),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        for layer in self.layers:
            x = x + layer["attention"](layer["norm1"](x))
            x = x + layer["mlp"](layer["norm2"](x))
        return self.head(x.mean(1))


ATTENTIONS = [Separate, Fused, ByHead, Grouped]
attentions = pytest.mark.parametrize("attention", ATTENTIONS)


def build(attention: type[nn.Module], seed: int = 0, fused: bool = True) -> nn.Module:
    """A network in double precision, half of whose heads and rows are zero."""
    model = Transformer(attention, fused)
    scatter_weights_(model)
    zero_units(model, (FeedForwardSelector() | HEADS)(model), seed)
    return model.double()


def batch(seed: int = 0) -> Tensor:
    """Three sequences of five."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 5, WIDTH, generator=generator, dtype=torch.float64)


@attentions
@settings(max_examples=3)
@given(seed=st.integers(0, 99), fused=st.booleans())
@example(seed=0, fused=True)
@example(seed=0, fused=False)
def test_half_of_heads_and_rows_go_and_nothing_changes(attention, seed, fused):
    """Every zero row is gone, and modules say of their heads what is there."""
    model = build(attention, seed, fused)
    expected = model(batch())
    n_before = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    report = shrink_(model, batch(1))
    torch.testing.assert_close(model(batch()), expected)
    assert report.channels[0] > 0
    assert report.channels[1] == 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name != "head.weight":
            left = {2: 1 / 2, 3: 2 / 3}[3 if attention is Grouped and "attention" in name else 2]
            assert parameter.numel() == n_before[name] * left
    n_heads = 4 if attention is Grouped else 3
    for layer in model.layers:
        module = layer["attention"]
        said = [getattr(module, key, n_heads) for key in ("num_heads", "num_attention_heads")]
        assert said == [n_heads, n_heads]
        assert getattr(module, "num_key_value_heads", 2) == 2
        assert getattr(module, "all_head_size", 12) == getattr(module, "attn_dim", 12) == 12


@attentions
def test_layers_lose_different_numbers_of_heads(attention):
    """A head of one layer and two of the other go."""
    model = Transformer(attention).double()
    scatter_weights_(model)
    parameters = dict(model.named_parameters())
    n_groups = 3 if attention is Grouped else 6
    for number, each in enumerate(HEADS(model)):
        with torch.no_grad():
            kept = torch.arange(n_groups) > number
            for part in each.members:
                here = torch.ones_like(parameters[part.name])
                part.write_(kept, here)
                parameters[part.name].mul_(here)
    expected = model(batch())
    shrink_(model, batch(1))
    torch.testing.assert_close(model(batch()), expected)
    said = [layer["attention"] for layer in model.layers]
    per_group = 2 if attention is Grouped else 1
    names = ("num_heads", "num_attention_heads")
    counts = [next(vars(m)[name] for name in names if name in vars(m)) for m in said]
    assert counts == [6 - per_group, 6 - 2 * per_group]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """With momentum and decay."""
    return torch.optim.SGD(parameters, 2e-3, momentum=0.9, weight_decay=1e-2)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """With decay."""
    return torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1)


@pytest.mark.parametrize(
    ("attention", "make"), [*((attention, sgd) for attention in ATTENTIONS), (Grouped, adamw)]
)
def test_training_afterwards_is_training_of_the_pruned_network(attention, make):
    """Search, prune, shrink and train on, beside the same without shrinking."""
    ends = []
    for shrinks in (False, True):
        model = Transformer(attention)
        scatter_weights_(model)
        model.double()
        opt = WormOptimizer(
            make(model.parameters()),
            model,
            FeedForwardSelector() | HEADS,
            scope="selector",
            sample_every=2,
            stopping_point=1.0,
            window=2,
            truncate="update",
        )
        for step in range(16):
            opt.zero_grad()
            (model(batch(step)) - step % 3).square().mean().backward()
            opt.step()
            if step == 7:
                assert opt.converged
                opt.prune()
            if step == 9 and shrinks:
                report = opt.shrink(batch(1))
                assert report.channels[0] > 0 == report.channels[1]
        ends.append(model(batch(99)))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


@attentions
def test_a_fresh_model_takes_the_shapes_and_the_numbers_of_heads(attention):
    """From the ``state_dict`` alone, bit for bit."""
    model = build(attention)
    shrink_(model, batch(1))
    fresh = Transformer(attention).double()
    load_shrunk_(fresh, copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh(batch()), model(batch()))


class ByNumber(Separate):
    """Joins its heads by a number that nothing can change."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        assert self.query(x).shape[-1] == 24
        return super().forward(x)


class ByTorch(nn.Module):
    """Torch's own attention, which compares the width of its heads with that of its input."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        return self.inner(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("attention", [ByNumber, ByTorch])
def test_heads_that_a_forward_counts_stay_and_rows_go(attention):
    """The report names them; numbers of heads are what they were."""
    model = build(attention)
    expected = model(batch())
    report = shrink_(model, batch(1))
    torch.testing.assert_close(model(batch()), expected)
    n_of_heads, n_of_rows = 2 * 36, 2 * 10
    assert report.channels == (n_of_heads + n_of_rows, n_of_heads)
    assert report.left.keys() == {
        f"layers.{number}.attention.{name}.weight"
        for number in range(2)
        for name in ("query", "key", "value")
    } or report.left.keys() == {f"layers.{n}.attention.inner.in_proj_weight" for n in range(2)}
    assert getattr(model.layers[0]["attention"], "num_attention_heads", 6) == 6


def test_the_last_head_and_the_last_row_stay():
    """Though all are zero, a layer of nothing would not run."""
    model = Transformer(Fused).double()
    with torch.no_grad():
        model.layers[0]["attention"].qkv.weight.zero_()
        model.layers[0]["mlp"].fc1.weight.zero_()
        model.layers[0]["mlp"].fc1.bias.zero_()
    expected = model(batch())
    with pytest.warns(UserWarning, match="2 trainable parameters of Transformer were zero as a"):
        report = shrink_(model, batch(1))
    assert report.zero == ["layers.0.attention.qkv.weight", "layers.0.mlp.fc1.weight"]
    torch.testing.assert_close(model(batch()), expected)
    assert model.layers[0]["attention"].num_heads == 1
    assert model.layers[0]["mlp"].fc1.out_features == 1
    assert "the last one of its layer: 1" in report.left["layers.0.mlp.fc1.weight"]


def test_sizes_of_multiples_hold_for_rows():
    """Heads are as wide as they are."""
    model = build(Separate)
    shrink_(model, batch(1), multiple_of=4)
    assert model.layers[0]["mlp"].fc1.out_features == 12


def test_each_selector_of_a_union_loses_its_share():
    """One ranking of all would take rows only, whose means spread wider than those of heads."""
    model = Transformer(Separate)
    with torch.no_grad():
        for layer in model.layers:  # as a pretrained network has them
            layer["mlp"].fc1.weight.mul_(torch.linspace(0.1, 1, N_HIDDEN)[:, None])
    shares = {}
    for scope in ("global", "selector"):
        opt = WormOptimizer(
            torch.optim.SGD(model.parameters(), 0.1),
            model,
            FeedForwardSelector() | HEADS,
            scope=scope,
            sample_every=None,
        )
        opt.sample()
        shares[scope] = [
            float(
                (~torch.cat([m for n, m in opt.candidate_mask.items() if key in n])).float().mean()
            )
            for key in ("fc1.weight", "query.weight")
        ]
    assert shares["selector"] == [0.5, 0.5]
    assert shares["global"][1] < 0.25


def test_groups_of_unions_are_counted_on():
    """``(a | b) | c`` has three."""
    model = Transformer(Separate)
    union = (FeedForwardSelector() | HEADS) | (lambda model: [Representative("head.weight")])
    groups = {each.selector_index for each in union(model)}
    assert groups == {0, 1, 2}
    trained, _ = select(union, model, model.parameters())
    assert [each.selector_index for each in trained] == [0, 0, 1, 1, 2]


# ---- models of transformers and timm


def small(kind: str) -> nn.Module:
    """A pretrained model's architecture, without its size."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0}
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=6,
            intermediate_size=20,
            max_position_embeddings=32,
            **common,
        )
        return transformers.BertForSequenceClassification(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=6, n_positions=32, **common)
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=20,
        tie_word_embeddings=True,
        **common,
    )
    return transformers.LlamaForCausalLM(config)


def pruned(kind: str) -> nn.Module:
    """Half of its heads and rows zero."""
    model = small(kind).eval()
    scatter_weights_(model)
    zero_units(model, (FeedForwardSelector() | HEADS)(model))
    return model


IDS = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_models_of_transformers_shrink_exactly(kind, attention):
    """Tied embeddings stay tied; logits and, with a cache, generated tokens are the same."""
    model = pruned(kind)
    model.set_attn_implementation(attention)
    expected = model(input_ids=IDS).logits
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    text = None if kind == "bert" else model.generate(IDS, **settings)
    report = shrink_(model, (), {"input_ids": IDS})
    assert report.channels[0] > 0 == report.channels[1]
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    if text is not None:
        assert torch.equal(model.generate(IDS, **settings), text)
        assert torch.equal(model.generate(IDS, use_cache=False, **settings), text)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_saved_model_of_transformers_is_loaded(kind, tmp_path):
    """``save_pretrained`` as usual; the dense network's config builds it, and shapes follow."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = pruned(kind)
    shrink_(model, (), {"input_ids": IDS})
    model.save_pretrained(tmp_path)
    fresh = type(model)(type(model.config).from_pretrained(tmp_path)).eval()
    weights = safetensors.load_file(tmp_path / "model.safetensors")
    load_shrunk_(fresh, weights)
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_gradient_checkpointing_goes_on_after_shrinking():
    """Gradients are those without it."""
    gradients = []
    for checkpointing in (False, True):
        model = pruned("llama").train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its name is to change
                model.gradient_checkpointing_enable({"use_reentrant": False})
        shrink_(model, (), {"input_ids": IDS})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a cache is of no use with it
            model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_vision_transformer_of_timm_shrinks_exactly():
    """Its heads are split by a number and joined by another."""
    timm = pytest.importorskip("timm")
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=6, num_classes=3
    ).eval()
    scatter_weights_(model)
    zero_units(model, (FeedForwardSelector() | HEADS)(model))
    images = torch.randn(2, 3, 16, 16)
    expected = model(images)
    report = shrink_(model, images)
    assert report.channels[0] > 0 == report.channels[1]
    torch.testing.assert_close(model(images), expected)
    assert (model.blocks[0].attn.num_heads, model.blocks[0].attn.attn_dim) == (3, 12)


def test_a_search_by_selectors_resumes_with_the_same_selectors_only():
    """Which of them found what decides the masks."""
    model = Transformer(Separate)

    def optimizer(selector: Any, scope: str) -> WormOptimizer:
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        return WormOptimizer(sgd, model, selector, scope=scope, sample_every=None)

    def some(*names: str) -> Any:
        return lambda model: [Representative(name) for name in names]

    parts = [f"layers.0.attention.{name}.weight" for name in ("query", "key", "value")]
    apart = FeedForwardSelector() | some(parts[0]) | some(*parts[1:])
    together = FeedForwardSelector() | some(*parts)
    for scope in ("global", "selector"):
        saved = optimizer(apart, scope).state_dict()
        optimizer(apart, scope).load_state_dict(saved)
        if scope == "global":
            optimizer(together, scope).load_state_dict(saved)
        else:
            with pytest.raises(ValueError, match="groups"):
                optimizer(together, scope).load_state_dict(saved)
