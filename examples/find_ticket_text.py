"""Find the winning ticket of a transformer while it trains, with WORM and with EB Train.

All networks start from the same weights and see the same batches. EB Train is here its stopping
rule, on training that nothing is truncated in. Each network is trained until its ticket is found,
pruned, shrunk where whole units went, and trained on; a dense one, in which nothing is searched,
trains for as many steps. The table compares what that cost and what was gained.

    python examples/find_ticket_text.py          # Python's own documentation, nothing to download
    python examples/find_ticket_text.py --select heads+ffn
    python examples/find_ticket_text.py --task rte --data-dir GLUE --model DIR-or-hub-name \
        --truncate gradient update --seeds 3

EarlyBERT's setting (Chen et al., ACL 2021, https://arxiv.org/abs/2101.00063), whole attention heads
and feed-forward neurons, found early in the one run that trains them:

    python examples/find_ticket_text.py --task mrpc --data-dir GLUE --model DIR-or-hub-name \
        --select heads+ffn --scope selector --prune-ratio 0.4

Without a task a small character-level language model learns the topics of Python's `help()`. The
tasks fine-tune a classifier on GLUE's own files, `TASK/train.tsv` and `TASK/dev.tsv`, gzipped or
not. Needs `pip install "torch-worm-optim[examples]"`. Writes results.json, ticket.pt and two
pictures into --out. Exits with 1 when a search runs out of epochs before its rule is met.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from report import Run, add_search_arguments, plot_losses, plot_trajectory, table, write
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from torch_worm_optim import FeedForwardSelector, QueryKeySelector, WormOptimizer

# What is ranked. The zeros of whole heads and of feed-forward neurons can be cut out afterwards.
ENTRIES = {"qk": QueryKeySelector(), "qkv": QueryKeySelector(value=True)}
UNITS = {"heads": QueryKeySelector(value=True, granularity="head"), "ffn": FeedForwardSelector()}
UNITS["heads+ffn"] = UNITS["heads"] | UNITS["ffn"]
SELECTORS = ENTRIES | UNITS

# GLUE's folders, columns and labels.
TASKS = {
    "sst2": ("SST-2", ("sentence",), "label"),
    "mrpc": ("MRPC", ("#1 String", "#2 String"), "Quality"),
    "rte": ("RTE", ("sentence1", "sentence2"), "label"),
}
LABELS = {"0": 0, "1": 1, "entailment": 0, "not_entailment": 1}


class Topics:
    """Predict the next character of the topics that Python's `help()` explains."""

    score = "perplexity"
    form = ".3f"
    context, width, n_heads, n_layers = 64, 128, 4, 2

    def __init__(self, args: argparse.Namespace) -> None:
        from pydoc_data.topics import topics

        text = "".join(topics[name] for name in sorted(topics))
        characters = sorted(set(text))
        index = {character: i for i, character in enumerate(characters)}
        ids = torch.tensor([index[character] for character in text], device=args.device)
        if args.limit:
            ids = ids[: args.limit]
        # Runs of whole windows, every tenth for testing.
        windows = ids[: len(ids) // (self.context + 1) * (self.context + 1)]
        windows = windows.view(-1, self.context + 1)
        test = torch.arange(len(windows)) % 10 == 9
        self.train, self.test = windows[~test], windows[test]
        self.n_characters = len(characters)

    def __len__(self) -> int:
        return len(self.train)

    def build(self, args: argparse.Namespace) -> nn.Module:
        """A decoder of 2 layers, 4 heads, 0.4 million parameters."""
        layers = [Layer(self.width, self.n_heads) for _ in range(self.n_layers)]
        return CharacterModel(self.n_characters, self.width, self.context, layers)

    def inputs(self, chosen: Tensor) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"ids": self.train[chosen, :-1]}

    def loss(self, model: nn.Module, chosen: Tensor) -> Tensor:
        """Cross entropy of each next character."""
        return F.cross_entropy(model(**self.inputs(chosen)).mT, self.train[chosen, 1:])

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Perplexity per character of the test windows."""
        model.eval()
        losses = [
            F.cross_entropy(model(w[:, :-1]).mT, w[:, 1:]).item() * len(w)
            for w in self.test.split(256)
        ]
        model.train()
        return math.exp(sum(losses) / len(self.test))


class Attention(nn.Module):
    """Attention to what came before, by as many heads as the weights have rows for."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.head_dim = width // n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """What each position gathers; -1, since a shrunk layer has fewer heads."""
        n, length, _ = x.shape
        q, k, v = (
            project(x).view(n, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        gathered = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(gathered.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a feed-forward block, each behind a norm and around a shortcut."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, n_heads)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """One layer on."""
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class CharacterModel(nn.Module):
    """A transformer that sees only what came before."""

    def __init__(self, n_characters: int, width: int, context: int, layers: list[Layer]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_characters, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.02)
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_characters)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next character after each."""
        x = self.embedding(ids) + self.positions
        return self.head(self.norm(self.layers(x)))


class Glue:
    """Fine-tune a classifier on sentences or pairs of them."""

    score = "accuracy, %,"
    form = ".2f"

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        if args.data_dir is None or args.model is None:
            raise SystemExit(
                f"--task {args.task} needs --data-dir, a folder that holds GLUE's "
                f"{TASKS[args.task][0]}, and --model, a directory or hub name of a BERT-shaped "
                "model."
            )
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.device = args.device
        self.train, self.train_labels = self._read(args, "train")
        self.test, self.test_labels = self._read(args, "dev")
        if args.limit:
            self.train, self.train_labels = (
                self.train[: args.limit],
                self.train_labels[: args.limit],
            )

    def __len__(self) -> int:
        return len(self.train)

    def _read(self, args: argparse.Namespace, split: str) -> tuple[list[list[int]], Tensor]:
        folder, columns, label = TASKS[args.task]
        path = args.data_dir / folder / f"{split}.tsv"
        packed = path.with_suffix(".tsv.gz")
        if not path.exists() and not packed.exists():
            raise SystemExit(f"There is neither {path} nor {packed.name}: pass GLUE's own files.")
        # Sentences hold bare quotation marks: fields end at tabs and nowhere else.
        raw = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
        header, *rows = raw.decode("utf-8-sig").rstrip("\n").split("\n")
        names = [name.strip() for name in header.split("\t")]
        fields = [row.split("\t") for row in rows]
        texts = [[row[names.index(c)].strip() for row in fields] for c in columns]
        labels = [LABELS[row[names.index(label)].strip()] for row in fields]
        ids = self.tokenizer(*texts, truncation=True, max_length=args.max_tokens)["input_ids"]
        return ids, torch.tensor(labels, device=self.device)

    def build(self, args: argparse.Namespace) -> nn.Module:
        """The pretrained encoder with a fresh classifier on it."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)

    def _batch(self, sentences: list[list[int]]) -> dict[str, Tensor]:
        return self.tokenizer.pad({"input_ids": sentences}, return_tensors="pt").to(self.device)

    def inputs(self, chosen: Tensor) -> dict[str, Tensor]:
        """What the model is called with."""
        return self._batch([self.train[i] for i in chosen.tolist()])

    def loss(self, model: nn.Module, chosen: Tensor) -> Tensor:
        """Cross entropy of the labels."""
        labels = self.train_labels[chosen.to(self.device)]
        return F.cross_entropy(model(**self.inputs(chosen)).logits, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the development set, in %."""
        model.eval()
        # Sentences of like length together, so that little is padding.
        order = sorted(range(len(self.test)), key=lambda i: len(self.test[i]))
        right = 0
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            logits = model(**self._batch([self.test[i] for i in chosen])).logits
            right += int((logits.argmax(1) == self.test_labels[chosen]).sum())
        model.train()
        return 100 * right / len(self.test)


def batches(n_examples: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Whole batches of examples in random order, epoch after epoch."""
    while True:
        order = torch.randperm(n_examples, generator=generator)
        yield from order[: n_examples // size * size].split(size)


def train(
    args, task, model, opt, stream, n_steps: int, losses: list, seconds: list, bar: tqdm, name: str
) -> None:
    """The loop that everybody writes; it ends early at a ticket, and adds each step to the lists.

    Losses are all those of the network, so that they count its epochs; seconds are the bar's.
    """
    steps = len(task) // args.batch_size
    searching = not getattr(opt, "converged", True)
    for chosen in itertools.islice(stream, n_steps):
        start = time.perf_counter()
        opt.zero_grad()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            loss = task.loss(model, chosen)
        loss.backward()
        opt.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        bar.update()
        if len(losses) % steps == 0:
            line = f"epoch {len(losses) // steps}: loss {statistics.fmean(losses[-steps:]):.3f}"
            if searching and opt.history and opt.history[-1].distances:
                line += f", largest distance {opt.history[-1].max_distance:.3f}"
            bar.set_postfix_str(line)
            if bar.disable:  # nobody looks at a terminal
                print(f"{name}, {line}, {sum(seconds):.1f} s", flush=True)
        if searching and opt.converged:
            break


def begin(args, task, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Iterator[Tensor]]:
    """A network, its optimizer and its batches; for a seed always the same."""
    torch.manual_seed(seed)
    model = task.build(args).to(args.device)
    model.train()
    adamw = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    return model, adamw, batches(len(task), args.batch_size, torch.Generator().manual_seed(seed))


def search(args, task, method: str, truncate: str, seed: int) -> tuple:
    """Train until the ticket is found; the network, its optimizer, and what is known so far."""
    model, adamw, stream = begin(args, task, seed)
    steps = len(task) // args.batch_size
    with warnings.catch_warnings():
        # That Adam undoes a truncated gradient is what --truncate gradient is here to show.
        warnings.filterwarnings("ignore", "AdamW normalises gradients")
        # The one line that changes. With nothing truncated, EB Train's stopping rule is left.
        opt = WormOptimizer(
            adamw,
            model,
            selector=SELECTORS[args.select],
            prune_ratio=args.prune_ratio,
            stopping_point=args.stopping_point,
            margin=args.margin,
            window=args.window,
            truncation=1 if method == "EB Train" else args.truncation,
            sample_every=args.sample_every or steps,
            scope=args.scope,
            min_keep=args.min_keep,
            truncate=truncate,
            trigger=args.trigger,
            fade=args.fade,
        )
    losses: list[float] = []
    seconds: list[float] = []
    name = f"seed {seed}, {method}: search"
    start = time.perf_counter()
    with tqdm(desc=name, unit="step", disable=None) as bar:
        n_steps = args.max_epochs * steps
        train(args, task, model, opt, stream, n_steps, losses, seconds, bar, name)
    run = Run(
        method=method,
        seed=seed,
        found=opt.converged,
        search_epochs=len(losses) / steps,
        search_seconds=time.perf_counter() - start,
        scores={"before pruning": task.evaluate(model)},
        history=opt.history,
        steps_per_epoch=steps,
        ticket=opt.final_mask if opt.converged else opt.candidate_mask or {},
        losses=losses,
        sizes=sizes(model, seconds[-steps:]),
    )
    return model, opt, stream, run


def sizes(model: nn.Module, seconds: list[float]) -> dict[str, tuple[float, ...]]:
    """Parameters, and the median of these steps' seconds."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "M parameters": (n_parameters / 1e6,),
        "ms a step": (1e3 * statistics.median(seconds),),
    }


def retrain(args, task, model, opt, stream: Iterator[Tensor], run: Run, total: int) -> None:
    """Prune, shrink, and train on until ``total`` steps are done."""
    steps = run.steps_per_epoch
    torch.manual_seed(run.seed)  # the same dropout for all methods
    opt.prune()
    run.scores["after pruning"] = task.evaluate(model)
    if args.select in UNITS:
        run.report = opt.shrink(**task.inputs(torch.arange(args.batch_size)))
    goals = {
        "1 epoch retrained": steps,
        f"{args.retrain_epochs} epoch{'s' * (args.retrain_epochs > 1)} retrained": (
            args.retrain_epochs * steps
        ),
        "at equal epochs": total - len(run.losses),
    }
    seconds: list[float] = []
    name = f"seed {run.seed}, {run.method}: retrain"
    with tqdm(desc=name, unit="step", disable=None) as bar:
        for what, n_steps in goals.items():
            left = n_steps - len(seconds)
            train(args, task, model, opt, stream, left, run.losses, seconds, bar, name)
            run.scores[what] = task.evaluate(model)
    if args.select in UNITS:
        after = sizes(model, seconds[-steps:])
        run.sizes = {name: (*before, *after[name]) for name, before in run.sizes.items()}


def train_dense(args, task, seed: int, total: int) -> Run:
    """The same training, in which nothing is searched."""
    model, adamw, stream = begin(args, task, seed)
    steps = len(task) // args.batch_size
    losses: list[float] = []
    seconds: list[float] = []
    name = f"seed {seed}, dense"
    with tqdm(desc=name, unit="step", disable=None) as bar:
        train(args, task, model, adamw, stream, total, losses, seconds, bar, name)
    return Run(
        "dense",
        seed,
        scores={"at equal epochs": task.evaluate(model)},
        steps_per_epoch=steps,
        losses=losses,
        sizes=sizes(model, seconds[-steps:]),
    )


def compare(args, task, methods: dict[str, str], seed: int) -> list[Run]:
    """All searches of one seed, and dense training, to the same number of steps."""
    searched = [search(args, task, *method, seed) for method in methods.items()]
    found = [run for *_, run in searched if run.found]
    # The method that stops first has trained less: it may train on until all have had as much.
    steps = len(task) // args.batch_size
    total = max((len(run.losses) for run in found), default=0) + args.retrain_epochs * steps
    for *network, run in searched:
        if run.found:
            retrain(args, task, *network, run, total)
    runs = [train_dense(args, task, seed, total), *(run for *_, run in searched)]
    for run in runs:
        scores = ", ".join(f"{what} {value:{task.form}}" for what, value in run.scores.items())
        print(f"seed {seed}, {run.method}: {scores}", flush=True)
    return runs


def parse() -> argparse.Namespace:
    """Arguments; the search has the paper's for its tasks, s = 0.01, and 0.05 for topics."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=["topics", *TASKS], default="topics", help="what to train on")
    add("--data-dir", type=Path, help="the folder that holds GLUE's folders")
    add("--model", help="for GLUE: directory or hub name of a BERT-shaped model")
    add(
        "--select",
        choices=SELECTORS,
        default="qk",
        help="what is ranked: entries of query and key weights, the paper's; of value weights too, "
        "its Table 4; or whole heads, feed-forward neurons, or both, which are cut out",
    )
    add(
        "--truncate",
        nargs="+",
        choices=["gradient", "update"],
        default=["update"],
        help="what r scales; each given is compared with EB Train",
    )
    add("--limit", type=int, help="train on the first LIMIT sentences (or characters) only")
    add("--max-tokens", type=int, default=128, help="cut longer sentences or pairs")
    add("--bf16", action="store_true", help="train in mixed precision")
    add("--seeds", type=int, default=1, help="number of seeds, counted from 0")
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("runs/find_ticket_text"), help="folder for results")
    add("--lr", type=float, help="learning rate of AdamW (default: 1e-3 for topics, 5e-5 for GLUE)")
    add("--weight-decay", type=float, default=0.01, help="weight decay of AdamW")
    add("--batch-size", type=int, default=32, help="examples in a batch")
    add("--max-epochs", type=int, default=20, help="give up the search after so many")
    add("--retrain-epochs", type=int, default=1, help="epochs after pruning, at least")
    add_search_arguments(parser, window=3, stopping_point=None, margin=None, scope=None)
    args = parser.parse_args()
    # The paper's thresholds are for a pretrained network; a fresh one moves five times as far.
    fresh = args.task == "topics"
    if args.stopping_point is None:
        args.stopping_point = 0.05 if fresh else 0.01
    if args.margin is None:
        args.margin = args.stopping_point / 2
    if fresh and args.sample_every is None:
        args.sample_every = 100
    if args.scope is None:
        # Scores of heads are means of many entries and differ less than those of neurons: ranked
        # together, no head may go at all.
        args.scope = "selector" if args.select == "heads+ffn" else "global"
    args.lr = args.lr or (1e-3 if args.task == "topics" else 5e-5)
    args.device = torch.device(args.device)
    return args


def main() -> None:
    """Search, prune, retrain, compare."""
    args = parse()
    task = Topics(args) if args.task == "topics" else Glue(args)
    if len(task) < args.batch_size:
        raise SystemExit(f"{len(task)} examples do not fill a batch of {args.batch_size}.")
    methods = {"EB Train": "update"}
    for truncate in args.truncate:
        methods["WORM" if len(args.truncate) == 1 else f"WORM, {truncate}"] = truncate
    runs = [run for seed in range(args.seeds) for run in compare(args, task, methods, seed)]
    first = next((run for run in runs if run.report), None)
    if first:
        print(f"\nShrunk, {first.method} with seed {first.seed}:\n{first.report}")

    title = (
        f"{args.task}, {args.select}, p = {args.prune_ratio:g}, window {args.window}, "
        f"r = {args.truncation:g} ({' and '.join(args.truncate)})"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    plot_trajectory(runs, args, title, args.out / "trajectory.png")
    plot_losses(runs, title, args.out / "losses.png")
    write(runs, args, f"{title}, {args.seeds} seed(s)\n\n{table(runs, task.score, task.form)}")


if __name__ == "__main__":
    main()
