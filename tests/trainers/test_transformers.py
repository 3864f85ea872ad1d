"""The Trainer of transformers, and the callback for it."""

from __future__ import annotations

import pytest
import torch
from loops import (
    SEARCH,
    assert_pruned,
    assert_reports,
    assert_same_run,
    assert_shrunk_once,
    batches,
    callback_for,
    train_and_shrink,
    train_plainly,
    wrapped,
)
from torch import nn
from training import BASES, same, small_cnn, weights_of

from torch_worm_optim import Phase, WormOptimizer, load_shrunk_

# torch says so of pinned memory where there is no accelerator to pin it for.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


class Classifier(nn.Module):
    """The small network as the Trainer wants it, with the loss among its outputs."""

    def __init__(self):
        super().__init__()
        self.net = small_cnn()

    def forward(self, images, labels):
        """Loss and logits."""
        logits = self.net(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def worm_for_classifier(classifier, **options):
    """The optimizer of the plain loop, for the network inside."""
    sgd = BASES["SGD momentum"](classifier.parameters())
    return WormOptimizer(sgd, classifier.net, **{**SEARCH, **options})


def hf_trainer(directory, n_batches, classifier, optimizer=None, *, callbacks=None, **options):
    """A Trainer over the batches, which it shuffles; and the batches, in the order of training."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    given = options.pop("optimizer_cls_and_kwargs", None)
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        **{
            "per_device_train_batch_size": 16,
            "num_train_epochs": 1,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            **options,
        },
    )
    seen = []

    def collate(rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        seen.append((batch["images"], batch["labels"]))
        return batch

    rows = [
        {"images": image, "labels": label}
        for images, labels in batches(0, n_batches)
        for image, label in zip(images, labels, strict=True)
    ]
    trainer = transformers.Trainer(
        classifier,
        arguments,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows,
        optimizers=(optimizer, None),
        optimizer_cls_and_kwargs=given,
        callbacks=callbacks,
    )
    return trainer, seen


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_trains_as_the_plain_loop(tmp_path, accumulate, bf16):
    """Accumulating, clipping, in mixed precision and on a schedule, the Trainer changes no bit."""
    classifier = Classifier()
    opt = worm_for_classifier(classifier)
    trainer, seen = hf_trainer(
        tmp_path,
        16 * accumulate,
        classifier,
        opt,
        gradient_accumulation_steps=accumulate,
        bf16=bf16,
    )
    trainer.train()

    net, plain = wrapped()
    train_plainly(net, plain, seen, accumulate=accumulate, bf16=bf16, clip=1.0)
    assert_same_run(classifier.net, opt, net, plain)
    assert trainer.optimizer.optimizer is opt


def test_makes_the_optimizer_itself(tmp_path):
    """optimizer_cls_and_kwargs= takes a factory of a function of the model."""
    classifier = Classifier()
    trainer, seen = hf_trainer(
        tmp_path,
        16,
        classifier,
        optimizer_cls_and_kwargs=(lambda: worm_for_classifier, {"window": 6}),
    )
    trainer.train()

    net, plain = wrapped()
    train_plainly(net, plain, seen, clip=1.0)
    assert_same_run(classifier.net, trainer.optimizer.optimizer, net, plain)


@pytest.mark.parametrize("stop", [5, 14])
def test_resumes_a_bert(tmp_path, stop):
    """train(resume_from_checkpoint=...), while truncating or after the ticket, changes no bit."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    )
    rows = [{"input_ids": torch.randint(20, (8,)), "labels": i % 2} for i in range(32)]

    def run(max_steps, checkpoint=None):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        opt = WormOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.01), model, truncate="update", **SEARCH
        )
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                max_steps=16,
                lr_scheduler_type="linear",
                save_strategy="steps",
                save_steps=stop,
                logging_strategy="no",
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=rows,
            optimizers=(opt, None),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return model, opt

    whole = run(16)
    assert_same_run(*whole, *run(16, checkpoint=str(tmp_path / f"checkpoint-{stop}")))


def worm_rows(trainer):
    """What the callback logged of each mask, by the Trainer's step."""
    logged = trainer.state.log_history
    return [(row["step"], row) for row in logged if "worm/phase" in row]


@pytest.mark.parametrize("at_ticket", ["continue", "stop", "prune"])
def test_callback_logs_and_acts(tmp_path, at_ticket):
    """Each mask is logged once and no loss is lost to it; at the ticket it stops or prunes."""
    classifier = Classifier()
    opt = worm_for_classifier(classifier)
    trainer, _ = hf_trainer(
        tmp_path, 16, classifier, opt, logging_strategy="steps", logging_steps=4
    )
    callback = callback_for("transformers")
    trainer.add_callback(callback(trainer, at_ticket))
    trainer.train()

    assert_reports(worm_rows(trainer), opt, 3 if at_ticket == "prune" else 2)
    last = 12 if at_ticket == "stop" else 16
    losses = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert losses == list(range(4, last + 1, 4))
    assert trainer.state.global_step == last
    assert opt.phase is (Phase.PRUNED if at_ticket == "prune" else Phase.CONVERGED)
    zeros = 20 - int(sum(classifier.net[i].weight.count_nonzero() for i in (1, 4)))
    assert zeros == (10 if at_ticket == "prune" else 0)


def test_callback_prunes_at_the_ticket(tmp_path):
    """Training goes on as the plain loop that prunes there does, bit for bit, also from then on."""
    callback = callback_for("transformers")
    runs = []
    for checkpoint in (None, "checkpoint-14"):
        classifier = Classifier()
        opt = worm_for_classifier(classifier)
        trainer, seen = hf_trainer(
            tmp_path, 16, classifier, opt, save_strategy="steps", save_steps=2
        )
        trainer.add_callback(callback(trainer, "prune"))
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        runs.append((classifier.net, opt, seen))
        assert_reports(worm_rows(trainer), opt, 3)

    net, plain = wrapped()
    train_plainly(net, plain, runs[0][2][:12], clip=1.0)
    plain.prune()
    train_plainly(net, plain, runs[0][2][12:], clip=1.0)
    for its_net, opt, _ in runs:
        assert_same_run(its_net, opt, net, plain)
        assert opt.phase is Phase.PRUNED


@pytest.mark.parametrize(
    ("at_ticket", "late", "best"),
    [("prune", False, 12), ("prune", True, 4), ("shrink", False, 12)],
)
def test_callback_prunes_the_best_model(tmp_path, at_ticket, late, best):
    """The best of the pruned is loaded, also if it is shrunk, and where there is none one pruned.

    The first model that is evaluated counts as the best, and so does the first once that is reset.
    A late ticket comes after the last step.
    """
    transformers = pytest.importorskip("transformers")
    classifier = Classifier()
    opt = worm_for_classifier(classifier, **({"sample_every": None, "window": 2} if late else {}))

    class SamplesEachEpoch(transformers.TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            opt.sample()

    trainer, _ = hf_trainer(
        tmp_path,
        8,
        classifier,
        opt,
        callbacks=[SamplesEachEpoch()] if late else None,
        num_train_epochs=2,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=4,
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="step",
        greater_is_better=False,
    )
    trainer.compute_metrics = lambda _: {"step": trainer.state.global_step}
    inputs = batches(0, 1)[0][0][:1]
    trainer.add_callback(callback_for("transformers")(trainer, at_ticket, inputs=inputs))
    trainer.train()

    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    safetensors = pytest.importorskip("safetensors.torch")
    saved = safetensors.load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert torch.equal(saved["net.8.weight"], classifier.net[8].weight)
    if at_ticket == "prune":
        assert_pruned(classifier.net.state_dict(), opt)
        assert bool(saved["net.1.weight"].all()) == late
    else:
        assert classifier.net[0].out_channels + classifier.net[3].out_channels == 10


def test_callback_prunes_what_training_leaves(tmp_path):
    """Weights that another callback puts into the model when training ends are pruned."""
    transformers = pytest.importorskip("transformers")
    classifier = Classifier()
    opt = worm_for_classifier(classifier)

    class LoadsOthers(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            classifier.load_state_dict(Classifier().state_dict())

    trainer, _ = hf_trainer(tmp_path, 16, classifier, opt, callbacks=[LoadsOthers()])
    trainer.add_callback(callback_for("transformers")(trainer, "prune"))
    trainer.train()
    assert_pruned(classifier.net.state_dict(), opt)


@pytest.mark.parametrize("whole", [False, True])
def test_callback_shrinks_once(tmp_path, whole):
    """Accelerate's wrapper and the schedule go on in the smaller network, also from a checkpoint.

    The optimizer is built with the whole model, which is called with a dict, or with a part of it.
    """
    callback = callback_for("transformers")
    runs = []
    for checkpoint in (None, tmp_path / "checkpoint-15"):
        classifier = Classifier()
        if checkpoint is not None:
            safetensors = pytest.importorskip("safetensors.torch")
            load_shrunk_(classifier, safetensors.load_file(checkpoint / "model.safetensors"))
        opt = worm_for_classifier(classifier)
        if whole:
            _, opt = wrapped(model=classifier)
        trainer, seen = hf_trainer(
            tmp_path,
            16,
            classifier,
            opt,
            lr_scheduler_type="linear",
            save_strategy="steps",
            save_steps=5,
        )
        images, labels = batches(0, 1)[0]
        inputs = {"images": images[:1], "labels": labels[:1]} if whole else images[:1]
        trainer.add_callback(callback(trainer, "shrink", inputs=inputs))
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        shrunk = [
            (row["step"], row)
            for row in trainer.state.log_history
            if "worm/parameters_after" in row
        ]
        runs.append((classifier.net, opt, shrunk, seen))

    def rate(opt):
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: max(0, (16 - step) / 16))

    net, plain, report = train_and_shrink(runs[0][3], rate=rate, clip=1.0)
    for its_net, opt, shrunk, _ in runs:
        assert same(weights_of(its_net), weights_of(net))
        assert opt.history == plain.history
        assert opt.phase is Phase.PRUNED
        assert_shrunk_once(its_net, shrunk, report, 12)
    assert trainer.optimizer.optimizer is opt


def test_callback_goes_on_after_a_resume(tmp_path):
    """Masks from before a checkpoint are not logged again; a search that has stopped stays so."""
    callback = callback_for("transformers")
    rows = []
    for checkpoint, at_ticket, last in (
        (None, "continue", 16),
        ("checkpoint-4", "continue", 16),
        ("checkpoint-12", "stop", 13),
    ):
        classifier = Classifier()
        opt = worm_for_classifier(classifier)
        trainer, _ = hf_trainer(tmp_path, 16, classifier, opt, save_strategy="steps", save_steps=4)
        trainer.add_callback(callback(trainer, at_ticket))
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / checkpoint))
        rows.append(worm_rows(trainer))
        assert trainer.state.global_step == last

    assert rows[0] == rows[1] == rows[2]
    assert_reports(rows[0], opt, 2)


def test_callback_needs_a_search_to_watch(tmp_path):
    """Without a WormOptimizer, or with an unknown action, the message says what to do."""
    trainer, _ = hf_trainer(tmp_path, 1, Classifier())
    callback = callback_for("transformers")
    trainer.add_callback(callback(trainer))
    with pytest.raises(ValueError, match=r"to be a WormOptimizer, got AdamW\. Pass one"):
        trainer.train()
    with pytest.raises(ValueError, match=r"`at_ticket` must be one of .* got 'halt'"):
        callback(trainer, "halt")
    with pytest.raises(ValueError, match='"shrink"` needs `inputs`, since the Trainer shows'):
        callback(trainer, "shrink")
