"""Settings: types, bounds, presets, older runs and the command line."""

import ast
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import checkpoint
import config as settings
from config import (
    BASE_RECIPE,
    OLD_NAMES,
    PRESETS,
    Config,
    changes,
    describe,
    describe_presets,
    parse_command_line,
    preset,
    restore,
)

RECIPE = {f.name for f in fields(Config) if f.metadata["recipe"]}
WRONG = {
    int: (1.5, "1", None, True),
    float: ("1", None, True, float("nan")),
    bool: (1, "yes", None),
    str: (1, None, ""),
}


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_wrong_types_and_values_are_refused(name: str) -> None:
    (f,) = (f for f in fields(Config) if f.name == name)
    bad = list(WRONG[f.type])
    if f.type in (int, float):
        low, high = f.metadata["min"], f.metadata["max"]
        assert -float("inf") < low < high < float("inf"), "a number without bounds"
        bad += [f.type(low) - 1, f.type(high) + 1]
    if f.metadata["choices"] or f.metadata["pattern"]:
        bad.append("no such / value")
    for value in bad:
        with pytest.raises(ValueError, match=name) as caught:
            Config(**{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "contradicting",
    [
        {"images_per_class": 20, "validation_per_class": 20},
        {"schedule": "cosine", "lr_step": 3},
        {"teacher_views": 2, "dropout": 0.1, "teacher": "any.pth"},
        {"teacher_views": 2, "teacher": "none"},
        {"pretrained": True, "model": "mobilenetv3"},
    ],
)
def test_contradictions_are_refused(contradicting: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(contradicting))):
        Config(**contradicting)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fixes_the_whole_recipe(name: str) -> None:
    assert preset(name).keys() == RECIPE
    assert PRESETS[name].keys() <= RECIPE
    config = parse_command_line(["--experiment", name]).config
    assert {key: asdict(config)[key] for key in RECIPE} == preset(name)
    assert changes(config) == {}
    assert changes(replace(config, epochs=7)) == {"epochs": 7}
    assert describe(replace(config, epochs=7, threads=3, data_dir="elsewhere")) == f"{name}, epochs=7"


def other_default(field: str, value: Any) -> Any:
    """Another value of the same type."""
    choices = next(f for f in fields(Config) if f.name == field).metadata["choices"]
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, str):
        return f"{value}2"
    return not value if isinstance(value, bool) else value + 1


def with_edited_defaults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """config.py as if a user had edited the default of every setting of the recipe."""
    tree = ast.parse(Path(settings.__file__).read_text())
    (config_class,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
    edited = set()
    for node in config_class.body:
        if isinstance(node, ast.AnnAssign) and node.target.id in RECIPE:
            default = node.value.args[0]
            node.value.args[0] = ast.Constant(other_default(node.target.id, ast.literal_eval(default)))
            edited.add(node.target.id)
    assert edited == RECIPE
    module = ModuleType("edited_config")
    monkeypatch.setitem(sys.modules, "edited_config", module)
    exec(compile(ast.fix_missing_locations(tree), "edited_config", "exec"), module.__dict__)
    assert all(getattr(module.Config, name) != getattr(Config, name) for name in RECIPE)
    return module


def test_editing_a_default_moves_no_preset_and_no_older_run(monkeypatch: pytest.MonkeyPatch) -> None:
    edited = with_edited_defaults(monkeypatch)
    for name in PRESETS:
        assert edited.preset(name) == preset(name)
        assert asdict(edited.Config(**edited.preset(name))) == asdict(Config(**preset(name)))
    assert asdict(edited.restore({})) == asdict(restore({}))
    with pytest.raises(ValueError, match="must be between"):
        edited.Config()
    resumed = edited.parse_command_line(["--resume", "run", "--threads", "2"])  # it needs none of these defaults
    assert resumed.given == {"threads": 2}


def test_a_setting_that_an_older_run_lacks_is_off() -> None:
    base = {
        "optimizer": "adamw", "schedule": "step", "warmup_epochs": 0, "label_smoothing": 0, "dropout": 0, "ema": 0,
        "flip": False, "crop_padding": 0, "trivial_augment": 0, "cutout": 0, "mixup": 0, "cutmix": 0,
        "small_fraction": 0,
    }  # fmt: skip
    assert base.items() <= asdict(restore({})).items()
    on = Config(**preset("scratch") | {"schedule": "step", "lr_step": 3, "cutout": 8, "mixup": 0.2, "mix_prob": 0.5})
    for name in RECIPE:
        older = asdict(on)
        del older[name]
        (f,) = (f for f in fields(Config) if f.name == name)
        assert restore(older) == replace(on, **{name: f.metadata["base"]}), name


def test_unknown_settings_are_refused() -> None:
    for unknown in ("cutout_size", "__class__"):
        with pytest.raises(ValueError, match=f"does not know {unknown}") as caught:
            restore(asdict(Config()) | {unknown: 1})
        assert "\n" not in str(caught.value)


def test_wrong_values_of_an_older_run_are_refused() -> None:
    with pytest.raises(ValueError, match="epochs must be between"):
        restore(asdict(Config()) | {"epochs": 0})


def test_old_names_are_read() -> None:
    older = asdict(replace(Config(), mix_prob=0.3, small_fraction=0.7))
    for old, new in (("mix_share", "mix_prob"), ("small_share", "small_fraction")):
        older[old] = older.pop(new)
    restored = restore(older)
    assert (restored.mix_prob, restored.small_fraction) == (0.3, 0.7)
    assert not OLD_NAMES.keys() & asdict(restored).keys()
    assert set(OLD_NAMES.values()) <= asdict(restored).keys()


@pytest.mark.parametrize(("file", "name"), [("published", "taught"), ("scratch", "scratch")])
def test_the_shipped_checkpoints_have_the_settings_of_their_presets(file: str, name: str) -> None:
    restored = asdict(restore(checkpoint.load(Path(f"checkpoints/{file}.pth"))["config"]))
    assert {key: restored[key] for key in RECIPE} == preset(name)


def test_wrong_entries_in_config_py_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A preset with a misspelt setting, and a setting that has no value for "off"."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setitem(PRESETS, "result2", {"dropuot": 0.1})
        parse_command_line(["--experiment", "result2"])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "preset result2" in line and "dropuot" in line
    with pytest.raises(TypeError, match=r"the setting with the help 'new step' needs a base"):
        settings.setting(1.0, "new step")


def test_published_experiments() -> None:
    """Epochs, StepLR and dropout as published."""
    expected = {
        "result1": (100, 40, 0.1, 0.0),
        "result2": (100, 35, 0.1, 0.0),
        "result3": (100, 35, 0.1, 0.2),
        "result4": (100, 35, 0.1, 0.1),
        "result5": (100, 38, 0.5, 0.0),
        "result6": (130, 38, 0.5, 0.0),
    }
    for name, values in expected.items():
        recipe = preset(name)
        assert (recipe["epochs"], recipe["lr_step"], recipe["lr_gamma"], recipe["dropout"]) == values
        assert (recipe["optimizer"], recipe["lr"], recipe["weight_decay"]) == ("adamw", 1e-2, 1e-4)
        assert (recipe["schedule"], recipe["batch_size"], recipe["decay_norms"]) == ("step", 128, True)
        off = ("warmup_epochs", "label_smoothing", "ema", "flip", "crop_padding", "trivial_augment", "cutout")
        assert not any(recipe[technique] for technique in (*off, "mixup", "cutmix", "small_fraction"))


def test_flags_beside_resume_are_not_checked_against_the_defaults() -> None:
    """lr_step has no meaning beside the defaults' cosine, but the run may have StepLR."""
    arguments = parse_command_line(["--resume", "runs/x", "--lr_step", "38"])
    assert arguments.given == {"lr_step": 38}


def test_resume_with_an_empty_folder_name_does_not_start_a_new_run() -> None:
    """As a shell variable that is not set gives it."""
    assert parse_command_line(["--resume", ""]).resume is not None
    assert parse_command_line([]).resume is None


def test_flags_override_a_preset() -> None:
    arguments = parse_command_line(["--experiment", "result6", "--epochs", "3", "--flip"])
    assert arguments.config == Config(**(preset("result6") | {"experiment": "result6", "epochs": 3, "flip": True}))
    assert arguments.given == {"experiment": "result6", "epochs": 3, "flip": True}
    assert parse_command_line(["--no-flip", "--ema", "0.5"]).config == Config(flip=False, ema=0.5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--no_such_flag"],
        ["no_such_argument"],
        ["--epoch", "3"],
        ["--epochs", "many"],
        ["--epochs", "0"],
        ["--lr", "nan"],
        ["--experiment", "result7"],
        ["--device", "tpu"],
        ["--schedule", "no_such"],
        ["--schedule", "cosine", "--lr_step", "4"],
        ["--resume", "runs/x", "--device", "tpu"],
        ["--small_share", "0.5"],
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(flags)
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_presets_are_described_by_what_they_change() -> None:
    """The base recipe whole, and what each preset changes in it."""
    described = " ".join(describe_presets().split())
    for name, recipe in {"the base recipe": BASE_RECIPE, **PRESETS}.items():
        assert f"{name}: {', '.join(f'{key}={value}' for key, value in recipe.items())}" in described
        assert preset(name) == BASE_RECIPE | recipe if name in PRESETS else recipe.keys() == RECIPE


def test_help_lists_every_setting_and_the_presets(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["-h"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for f in fields(Config):
        text = " ".join(shown.partition(f"  --{f.name}")[2].split("\n  --")[0].split())
        assert f.metadata["help"] in text or f.name == "experiment"
        assert text.endswith(f"[{f.default}]") or f.name in ("experiment", "runs_dir")  # the presets follow the last
    assert "--resume" in shown
    assert describe_presets() in shown
