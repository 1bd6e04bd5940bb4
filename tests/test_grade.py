"""The grade of checkpoints/best.pth if it is there, otherwise of the published checkpoint."""

import functools
from pathlib import Path
from typing import Any

import pytest

import checkpoint
import evaluate
from tests.helpers import PUBLISHED
from tools import results
from utils import UserError, shown

SHIPPED = {"published.pth": results.PUBLISHED, "default.pth": "default-0"}  # the record of each file


@functools.cache
def graded(path: Path, data_dir: str) -> dict[str, Any]:
    return evaluate.grade(path, data_dir=data_dir)


def test_grade(network: tuple[int, str, int, int], request: pytest.FixtureRequest, tell: Any) -> None:
    path, (operations, size, parameters, _) = evaluate.default_checkpoint(), network
    cost = f"flops = {operations}", f"Model parameter size = {size} kB"
    other = "" if path != checkpoint.PUBLISHED or network == PUBLISHED else "it is the published network's"
    try:
        _, content = checkpoint.load_model(path)
    except UserError as error:
        other = str(error)
    if other:
        tell(*cost)
        pytest.fail(
            f"The network of model.py now measures flops = {operations}, size = {size} kB, {parameters} parameters, "
            f"and {shown(path)} does not belong to it ({other}). Train it: python train.py. Its weights become "
            "checkpoints/best.pth, which is then graded.",
            pytrace=False,
        )
    try:
        data_dir = request.getfixturevalue("cifar100")
    except pytest.skip.Exception as reason:
        tell(*cost, str(reason))
        raise
    result = graded(path, data_dir)
    tell(*evaluate.format_grade(result).splitlines()[-3:])
    assert (result["flops"], f"{result['size_kb']:.3f}", result["images"]) == (operations, size, 10_000)
    # It was chosen by its accuracy on validation images; the test set's is close if both are measured alike.
    validation = (content.get("metrics") or {}).get("validation_accuracy")
    points = 4 * max(1, 50 / (content["config"].get("validation_per_class") or 50)) ** 0.5  # few images scatter
    assert validation is None or result["accuracy"] == pytest.approx(validation, abs=points), (
        f"its validation accuracy was {validation:.2f} %. If the network was edited since, train it: python train.py"
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_checkpoints_keep_their_accuracy(name: str, published: Path, cifar100: str) -> None:
    result = graded(published.with_name(name), cifar100)
    recorded = results.read_records()[SHIPPED[name]]["test"]
    assert result["accuracy"] == pytest.approx(recorded["accuracy"], abs=0.02)
    assert result["top5"] == pytest.approx(recorded["top5"], abs=0.02)
    settings = checkpoint.load(published.with_name(name))["config"]
    assert not any(str(value).startswith("/") for value in settings.values()), "no path of the machine that trained it"
