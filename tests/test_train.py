"""Training: optimizer, schedule, EMA, the step, the loop, resume, and what stops a run."""

import copy
import math
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import augment
import checkpoint
import data
import evaluate
import model as models
import train
from augment import Loader
from config import Config
from tests.helpers import FILES, TINY, flags, in_call, interrupt, last, log_rows, official, same, states
from utils import ROOT

CPU = torch.device("cpu")
# The parts of a recipe that hold a state or draw random numbers. The schedule has not decayed when it is resumed.
ADAMW = {
    "epochs": 4, "lr_step": 3, "warmup_epochs": 1, "weight_decay": 0.3, "decay_norms": False, "label_smoothing": 0.1,
    "ema": 0.9, "dropout": 0.1, "flip": True, "crop_padding": 4, "trivial_augment": 0.5, "mixup": 0.2, "cutmix": 1.0,
}  # fmt: skip
SGD = {"epochs": 4, "optimizer": "sgd", "lr": 0.05, "schedule": "cosine", "weight_decay": 5e-4}
UNMIXED = ADAMW | {"mixup": 0.0, "cutmix": 0.0, "dropout": 0.0, "ema": 0.5}


def parts(config: Config) -> tuple[nn.Module, Loader, torch.optim.Optimizer, train.EMA]:
    """A run before its first step."""
    torch.manual_seed(config.seed)
    model = models.build_model(config.model, config.dropout)
    images, _ = data.load_training("synthetic", "", config.validation_per_class, config.images_per_class)
    return model, Loader(images, config), train.build_optimizer(model, config), train.EMA(model, config.ema)


def run_of(config: Config) -> Path:
    """The folder of the only run."""
    (folder,) = Path(config.runs_dir).iterdir()
    return folder


def rates(**settings: Any) -> list[float]:
    """The learning rate of each epoch."""
    config = replace(TINY, **{"lr": 1.0, "schedule": "step", "lr_gamma": 0.1} | settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], config.lr)
    scheduler, found = train.build_scheduler(optimizer, config), []
    for _ in range(config.epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_go_through_their_points() -> None:
    assert rates(epochs=6, lr_step=2) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates(epochs=7, lr_step=0) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01]), "thirds"
    warm = rates(warmup_epochs=2, epochs=8, lr_step=4)
    assert warm == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.1, 0.1, 0.1, 0.1])
    assert rates(warmup_epochs=2, epochs=4, lr_step=4)[:2] == pytest.approx([1 / 2, 1]), "at most a quarter of the run"
    cosine = [(1 + math.cos(math.pi * epoch / 8)) / 2 for epoch in range(8)]
    assert rates(schedule="cosine", epochs=8) == pytest.approx(cosine)
    warm = rates(schedule="cosine", epochs=8, warmup_epochs=2)
    assert warm == pytest.approx([cosine[0] / 3, cosine[1] * 2 / 3, *cosine[2:]])


@pytest.mark.parametrize("decay_norms", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_norms_and_biases_have_weight_decay_only_if_asked(name: str, decay_norms: bool) -> None:
    kinds = {
        "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999)}),
        "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    }
    model, (kind, usual) = models.MobileNetV3(), kinds[name]
    config = replace(TINY, optimizer=name, lr=0.05, weight_decay=0.3, decay_norms=decay_norms)
    optimizer = train.build_optimizer(model, config)
    assert type(optimizer) is kind and (usual | {"fused": True}).items() <= optimizer.defaults.items()
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.keys() == set(model.parameters()) and {group["lr"] for group in optimizer.param_groups} == {0.05}
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            weight = isinstance(module, nn.Conv2d | nn.Linear) and key == "weight"
            assert decays[parameter] == (0.3 if weight or decay_norms else 0.0)


@pytest.mark.parametrize("recipe", [SGD, UNMIXED], ids=["sgd", "adamw"])
def test_an_epoch_is_a_plain_loop(tiny: Config, recipe: dict[str, Any]) -> None:
    """Weights, averages, loss and accuracy, with gradients of autograd.grad and the loss by its formula."""
    config = replace(tiny, **recipe)
    model, loader, optimizer, ema = parts(config)
    plain, average = copy.deepcopy(model), copy.deepcopy(model)
    rule, losses, correct = train.build_optimizer(plain, config), [], 0
    for step, (images, labels) in enumerate(loader):
        logits = plain.train()(images)
        target = F.one_hot(labels, 100) * (1 - config.label_smoothing) + config.label_smoothing / 100
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        for p, gradient in zip(plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True):
            p.grad = torch.empty_like(p).copy_(gradient)  # in its layout, as the fused optimizers need it
        rule.step()
        decay = min(config.ema, (1 + step) / (10 + step)) if config.ema else 0
        for a, b in zip(average.state_dict().values(), plain.state_dict().values(), strict=True):
            a.copy_(decay * a + (1 - decay) * b if a.is_floating_point() else b)
        losses.append(loss.item())
        correct += (logits.argmax(1) == labels).sum().item()
    model.eval()  # as a validation leaves it
    result = train.train_one_epoch(model, loader, train.build_criterion(config, CPU), optimizer, ema, False)
    assert result == pytest.approx((sum(losses) / 12, 100 * correct / 192), rel=1e-4)
    mixed = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    assert train.batch_sums(torch.tensor(0.5), torch.eye(2), mixed).tolist() == [1, 2, 2]
    for ours, expected in ((model, plain), (ema.model, average)):
        for name, value in ours.state_dict().items():
            assert "num_batches" in name or torch.allclose(value, expected.state_dict()[name], atol=1e-4), name


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # as EMA's copy does
def test_a_step_on_a_gpu_stays_there(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: fake tensors have a device and no values. They cannot be mixed with those of another device, and
    give no value, for which a GPU would have to finish first. Only the epoch's sums are read."""
    config, reads = replace(tiny, **UNMIXED | {"dropout": 0.1}), []
    monkeypatch.setattr(augment, "Generator", lambda device: torch.Generator())  # a GPU's would need the GPU
    monkeypatch.setattr(Tensor, "backward", lambda loss: [setattr(p, "grad", torch.empty_like(p)) for p in weights])
    monkeypatch.setattr(train, "means", lambda sums: reads.append(sums.device.type))
    monkeypatch.setattr(data, "normalisation", data.normalisation.__wrapped__)  # nothing fake is to stay in its cache
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    for name in ("cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, None)
    images, _ = data.load_training("synthetic", "", config.validation_per_class, config.images_per_class)
    with FakeTensorMode() as mode:
        images = data.Images(*(mode.from_tensor(part).to("cuda") for part in images))
        with torch.device("cuda"):
            model = models.build_model(config.model, config.dropout)
        weights, loader, ema = list(model.parameters()), Loader(images, config), train.EMA(model, config.ema)
        optimizer, criterion = train.build_optimizer(model, config), train.build_criterion(config, torch.device("cuda"))
        assert loader.chunk > len(loader)
        train.train_one_epoch(model, loader, criterion, optimizer, ema, False)
        assert reads == ["cuda"]
        assert evaluate.predict_logits(ema.model, images.images).device.type == "cuda"
        x = images.labels
        for refused in (lambda: x + torch.zeros(2), x[0].item, x.tolist, x.nonzero, lambda: x[x > 0], x.cpu):
            with pytest.raises((RuntimeError, TypeError)):
                refused()


@pytest.mark.slow
def test_compiled_and_eager_train_alike(tiny: Config) -> None:
    """The names in the checkpoint are the plain model's."""
    try:
        folders = [train.train(replace(tiny, compile=compiled)) for compiled in (False, True)]
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"torch.compile needs a C++ compiler: {error}")
    eager, compiled = ([row["train_loss"] for row in log_rows(folder)] for folder in folders)
    assert compiled == pytest.approx(eager, rel=0.01)
    assert states(folders[0])["model"].keys() == states(folders[1])["model"].keys()


def test_a_run_trains_on_its_training_images_and_validates_the_ema_on_the_others(tiny: Config, monkeypatch) -> None:
    """The test set is not even loaded."""
    config, seen, sources, load = replace(tiny, epochs=1, ema=0.9), {}, [], data.load

    def watch(model: nn.Module, *images: Tensor) -> evaluate.Scores:
        seen.update(validation=images, model=copy.deepcopy(model.state_dict()))
        assert model.stem[0].weight.is_contiguous(memory_format=torch.channels_last), "for speed"
        return evaluate.evaluate(model, *images)

    monkeypatch.setattr(train, "Loader", lambda images, *args: seen.update(train=images) or Loader(images, *args))
    monkeypatch.setattr(train, "evaluate", watch)
    monkeypatch.setattr(data, "load", lambda *args: sources.append(args[2]) or load(*args))
    folder = train.train(config)
    images, labels = load("synthetic", "", "train", 3)
    for name, index in zip(("train", "validation"), data.split(labels, 1, 3), strict=True):
        assert torch.equal(seen[name][0], images[index]) and torch.equal(seen[name][1], labels[index])
    assert sources == ["train"]
    assert same(seen["model"], last(folder)["ema"]["model"])
    assert not torch.equal(seen["model"]["classifier.weight"], last(folder)["model"]["classifier.weight"])
    assert same(checkpoint.load(folder / "best.pth")["weights"], seen["model"])


def test_a_run_prints_its_epochs_and_writes_its_files_whole(tiny: Config, whole_files: set[int], capsys) -> None:
    config = replace(tiny, epochs=3, lr=0.01, lr_step=1, lr_gamma=0.5, runs_dir=f"{tiny.runs_dir} of $me")
    start = time.perf_counter()
    assert train.main(flags(config)) == 0
    took = time.perf_counter() - start
    printed, folder = capsys.readouterr().out, run_of(config)
    number = r"Loss: \d+\.\d{4}, (Train|Validation) Accuracy: \d+\.\d\d%"
    epoch = rf"Epoch \d/3\nTrain {number}\nValidation {number}\n(Saved Best Model\n)?Learning Rate: 0\.\d{{6}}\n"
    assert re.search(rf"Run folder: {re.escape(str(folder))}\n({epoch}){{3}}Best epoch: ", printed)
    command = shlex.split(printed.splitlines()[-1].partition(": ")[2])
    assert command == ["python", "evaluate.py", "--checkpoint", str(folder / "best.pth")]
    assert [row["lr"] for row in log_rows(folder)] == [0.01, 0.005, 0.0025], "the rate that the epoch used"
    history = last(folder)["history"]
    assert 0 < sum(row["seconds"] for row in history) < took
    assert all(row["images_per_second"] > 192 / row["seconds"] for row in history), "training alone is timed"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert {path.stat().st_ino for path in folder.iterdir()} <= whole_files


def test_only_a_better_top1_accuracy_replaces_the_best(tiny: Config, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    accuracies = iter([49.0, 50.0, 50.0, 48.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: evaluate.Scores(1.0, next(accuracies), 90.0))
    folder = train.train(replace(tiny, epochs=4))
    assert checkpoint.load(folder / "best.pth")["epoch"] == 2
    assert [row["validation_accuracy"] for row in last(folder)["history"]] == [49.0, 50.0, 50.0, 48.0]
    assert capsys.readouterr().out.count("Saved Best Model") == 2


def test_without_validation_each_epoch_is_the_best_so_far(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    folder = train.train(replace(tiny, validation_per_class=0))
    printed = capsys.readouterr().out
    assert "Validation" not in printed and printed.count("Saved Best Model") == 2
    assert {(row["validation_loss"], row["validation_accuracy"]) for row in log_rows(folder)} == {(None, None)}
    assert checkpoint.load(folder / "best.pth")["epoch"] == 2


@pytest.mark.parametrize("recipe", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_resume_is_bit_exact(tiny: Config, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Stopped in its third epoch: weights, EMA, optimizer, schedule and log are those of the uninterrupted run."""
    config = replace(tiny, **recipe)
    whole = train.train(config)
    with monkeypatch.context() as patch:
        in_call(patch, train.EMA, "update", 30, interrupt)
        assert train.main(flags(config)) == 130
    *command, folder = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command == ["Stopped.", "Resume", "with:", "python", "train.py", "--resume"]
    assert len(log_rows(Path(folder))) == 2
    assert train.main(["--resume", folder, "--threads", "1"]) == 0
    assert same(states(Path(folder)), states(whole)) and log_rows(Path(folder)) == log_rows(whole)


STOPS = {  # where, and in which call: after the second epoch's last step
    "best.pth": (os, "replace", 4),
    "log.csv": (os, "replace", 5),
    "last.pth": (os, "replace", 6),
    "curves.png": (train, "draw_curves", 1),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_resume_is_exact_wherever_a_run_was_stopped(tiny: Config, stop: Any, monkeypatch: Any, capsys: Any) -> None:
    if stop[0] is os:
        tiny = replace(tiny, validation_per_class=0)  # otherwise the second epoch may not be the best
    with monkeypatch.context() as patch:
        in_call(patch, *stop, interrupt)
        assert train.main(flags(tiny)) == 130
    folder = run_of(tiny)
    best = checkpoint.load(folder / "best.pth")["epoch"]
    assert stop[0] is train or f"Best epoch: {best} of 2" in capsys.readouterr().out
    assert not list(folder.glob(".*")), "no temporary file is left"
    (folder / ".last.pth.1.part").touch()  # as a killed process leaves it
    assert train.main(["--resume", str(folder)]) == 0
    whole = train.train(tiny)
    assert same(states(folder), states(whole)) and log_rows(folder) == log_rows(whole)
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_a_run_stopped_in_its_first_epoch_must_be_started_again(tiny: Config, monkeypatch: Any, capsys: Any) -> None:
    in_call(monkeypatch, os, "replace", 1, interrupt)
    assert train.main(flags(tiny)) == 130
    assert train.main(["--resume", str(run_of(tiny))]) == 1
    output = capsys.readouterr()
    assert "start the run again" in output.out and "last.pth does not exist" in output.err


def test_a_run_starts_from_weights_and_a_finished_one_stays_as_it_is(tiny: Config, tmp_path: Path) -> None:
    """Without those that are missing in the classifier or have another shape. The run is resumed without the file."""
    weights = tmp_path / "weights.pth"
    content = checkpoint.load(train.train(replace(tiny, epochs=1)) / "best.pth")["weights"]
    other = {name: value for name, value in content.items() if name != "classifier.bias"}
    checkpoint.save(weights, other | {"classifier.weight": torch.zeros(9, 32)})
    folder = train.train(replace(tiny, lr=1e-9, epochs=1, weights=str(weights), ema=0.9))
    for found in (states(folder)["model"], states(folder)["ema"]["model"]):
        assert torch.allclose(found["head.0.weight"], content["head.0.weight"], atol=1e-6)
    weights.unlink()
    good = (folder / "last.pth").read_bytes()
    assert train.main(["--resume", str(folder)]) == 0
    assert (folder / "last.pth").read_bytes() == good


NOT_FINITE = {  # where, in which call, in the second epoch, and what happens then
    "training": (train, "means", 2, lambda sums: (math.nan, 99.0)),
    "validation": (train, "evaluate", 2, lambda *_: evaluate.Scores(math.nan, 99.0, 99.0)),
    "statistics": (train.EMA, "update", 24, lambda ema: ema.averaged[4].fill_(math.inf)),
}


@pytest.mark.parametrize("fault", NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_run_that_is_not_finite_stops_and_keeps_earlier_epochs(tiny: Config, fault: Any, monkeypatch, capsys) -> None:
    in_call(monkeypatch, *fault)
    assert train.main(flags(replace(tiny, epochs=3, ema=0.9))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "not finite in epoch 2 at learning rate" in line and "lower lr" in line
    assert checkpoint.load(run_of(tiny) / "best.pth")["epoch"] == last(run_of(tiny))["epoch"] == 1


@pytest.fixture
def real(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run on what is taken for CIFAR-100, and an earlier run's checkpoints/best.pth."""
    official(monkeypatch, tmp_path / "data")
    checkpoint.BEST.write_text("an earlier run's")
    return replace(tiny, dataset="cifar100", data_dir=str(tmp_path / "data"), images_per_class=0)


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
def test_the_best_of_a_run_replaces_checkpoints_best(real: Config, number: int, monkeypatch, whole_files) -> None:
    """At its end, or when a signal stops it, and not before."""
    seen, validate = [], evaluate.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a: seen.append(checkpoint.BEST.read_text()) or validate(*a))
    if number:
        in_call(monkeypatch, train.EMA, "update", 20, lambda ema: signal.raise_signal(number))
    assert train.main(flags(real)) == (130 if number else 0)
    assert set(seen) == {"an earlier run's"} and last(run_of(real))["epoch"] == len(seen)
    assert checkpoint.BEST.read_bytes() == (run_of(real) / "best.pth").read_bytes()
    assert checkpoint.BEST.stat().st_ino in whole_files


def test_other_runs_never_replace_checkpoints_best(real: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each differs from such a run in one setting."""
    monkeypatch.setitem(data.SYNTHETIC, "train", (3, 5))
    others = {"dataset": "synthetic", "images_per_class": 2, "image_size": 64, "model": "test_convnext"}
    for name, value in others.items():
        if name == "model":
            pytest.importorskip("timm")
        train.train(replace(real, epochs=1, batch_size=1_000, **{name: value}))
        assert checkpoint.BEST.read_text() == "an earlier run's", name


def test_a_run_does_not_need_to_write_checkpoints(real: Config, capsys: pytest.CaptureFixture) -> None:
    """As in a checkout that is read-only."""
    checkpoint.BEST.unlink()
    checkpoint.BEST.parent.rmdir()
    checkpoint.BEST.parent.touch()
    assert train.main(flags(real)) == 0
    assert f"The best of this run is in {run_of(real)}" in capsys.readouterr().out


def test_relative_paths_are_those_of_the_repository(real: Config, tmp_path: Path, monkeypatch: Any) -> None:
    """Wherever the program is started."""
    checkpoint.save(tmp_path / "any.pth", models.MobileNetV3().state_dict())
    files = {"data_dir": "data", "runs_dir": "runs", "teacher": "any.pth", "weights": "any.pth"}
    deep = tmp_path.joinpath(*ROOT.parts[1:])  # in which none of these paths leads to its file
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    train.train(replace(real, **{name: os.path.relpath(tmp_path / file, ROOT) for name, file in files.items()}))
    assert sorted(path.name for path in run_of(real).iterdir()) == FILES


def test_each_setting_reaches_the_run(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that differs in one setting ends with other weights."""
    changes = ADAMW | SGD | {"batch_size": 20, "lr_step": 2, "lr_gamma": 0.1, "mixup": 1.0, "seed": 1, "epochs": 3}
    changes |= {"validation_per_class": 0, "images_per_class": 3}
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)  # for the time

    def weights(**settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        state = states(train.train(replace(tiny, **{"epochs": 4, "images_per_class": 2} | settings)))
        return state["model"], state["ema"]["model"]

    usual = weights()
    for name, value in changes.items():
        assert not same(weights(**{name: value}), usual), name


def test_a_run_sets_up_its_process(tiny: Config) -> None:
    threads = torch.get_num_threads() + 1
    for deterministic in (True, False):
        assert train.main(flags(replace(tiny, epochs=1, deterministic=deterministic, threads=threads))) == 0
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert torch.get_num_threads() == threads and torch.backends.cudnn.benchmark is not deterministic
    assert torch.tensor(2e-38) / 10 == 0, "denormal numbers are 0"
    assert all(signal.getsignal(n) is signal.default_int_handler for n in (signal.SIGTERM, signal.SIGINT))


def test_amp_needs_a_gpu(tiny: Config, capsys: pytest.CaptureFixture) -> None:
    folders = [train.train(replace(tiny, epochs=1, amp=amp)) for amp in (False, True)]
    assert same(*map(states, folders)) and "training in float32 on cpu" in capsys.readouterr().out


def test_bad_input_is_one_line_before_any_run(tiny: Config, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    for settings, reason in (
        ({"weights": str(tmp_path / "none.pth")}, "none.pth does not exist"),
        ({"device": "cuda:99"}, "Try --device cpu"),
        ({"validation_per_class": 3}, "lower validation_per_class"),
        ({"runs_dir": "/dev/null/runs"}, "Not a directory: '/dev/null/runs"),
        ({"model": "any_network"}, "pip install -r requirements.txt -r requirements-tools.txt"),
    ):
        assert train.main(flags(replace(tiny, **settings))) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("train.py: error: ") and reason in line
    assert not Path(tiny.runs_dir).exists()


def test_tensorboard_gets_the_log(tiny: Config) -> None:
    pytest.importorskip("tensorboard")
    folder = train.train(replace(tiny, tensorboard=True))
    assert b"validation_accuracy" in next(folder.glob("events*")).read_bytes()
