"""Write one HTML page on what a checkpoint gets right, gets wrong and costs: python -m tools.report."""

import copy
import io
import sys
from base64 import b64encode
from html import escape
from operator import itemgetter
from pathlib import Path
from string import Template

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluate
from config import Config, OneLineParser, add_data_dir
from data import SIDE, load_test
from model import MobileNetV3
from tools.labels import NAMES, SUPERCLASSES
from tools.predict import describe_checkpoint, open_checkpoint
from utils import atomic_write, program

PAGE = Template("""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>table { width: 100%; border-spacing: 0 }
:root { color-scheme: light dark; font: 1rem/1.4 sans-serif } p { overflow-wrap: anywhere } [role] { overflow-x: auto }
@media (prefers-color-scheme: dark) { .grid > img { filter: invert(1) hue-rotate(180deg) } } h3, figure { margin: 0 }
body { max-width: 75rem; margin: auto; padding: 1rem } figure img { width: 6rem; image-rendering: pixelated }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #8886; text-align: right } th:first-child { text-align: left }
td { background: linear-gradient(#0072b255 0 0) 0/var(--bar) no-repeat; min-width: 5rem; white-space: nowrap }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 1rem 1.5rem }
.images { display: flex; flex-wrap: wrap; gap: 4px } figure { width: 6rem; font-size: .8rem } img { max-width: 100% }
</style></head><body><h1>$title</h1><p>$about</p><main>$main</main></body></html>""")
BINS = 15  # of confidence, as in Guo et al., "On Calibration of Modern Neural Networks", 2017
SHOWN_PAIRS, SHOWN_MISTAKES, IMAGES_PER_PAIR = 12, 12, 4

Row = tuple[str | int | float, ...]
Mistake = tuple[Tensor, str, str, float]  # image uint8 (3, 32, 32), class, predicted class and its probability


def calibration(confidence: Tensor, correct: Tensor) -> tuple[float, Tensor]:
    """Expected calibration error (Guo et al., 2017) of predictions (N,).

    Also each bin's images, correct images and summed confidence, (3, BINS). Bin m holds confidences above m / BINS,
    up to (m + 1) / BINS.
    """
    index = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    sums = torch.stack([index.bincount(weight, BINS) for weight in (torch.ones_like(correct), correct, confidence)])
    return ((sums[1] - sums[2]).abs().sum() / len(index)).item(), sums


def stages(model: nn.Module) -> list[Row]:
    """Our network's stages from input to output, another network as one: name, output shape for one 3x32x32 image,
    parameters, bytes with buffers, multiply-adds as thop counts them."""
    import thop

    parts = {"network": model}
    if isinstance(model, MobileNetV3):
        parts = {"stem": model.stem} | {f"block {i}": block for i, block in enumerate(model.blocks, start=1)}
        parts |= {"head": model.head, "classifier": nn.Sequential(model.pool, nn.Flatten(), model.classifier)}
    rows, x = [], torch.zeros(1, 3, SIDE, SIDE)
    for name, part in parts.items():
        operations, parameters = thop.profile(copy.deepcopy(part), (x,), verbose=False)
        x = part(x).detach()
        shape = "x".join(map(str, x.shape[1:]))
        rows.append((name, shape, int(parameters), evaluate.model_bytes(part), int(operations)))
    return rows


def table(head: tuple[str, ...], rows: list[Row]) -> str:
    """A table that scrolls by itself. Fractions, which are floats of 0 to 1, are drawn as bars."""
    html = "".join(f'<th scope="col">{name}</th>' for name in head)
    for name, *values in rows:
        html += f'</tr><tr><th scope="row">{name}</th>'
        for v in values:
            html += f'<td style="--bar: {v:.1%}">{100 * v:.2f} %</td>' if isinstance(v, float) else f"<td>{v}</td>"
    return f'<div role="region" tabindex="0" aria-label="{head[0]}"><table><tr>{html}</tr></table></div>'


def png(file: io.BytesIO, description: str) -> str:
    """An image element that holds a PNG file."""
    return f'<img alt="{description}" src="data:image/png;base64,{b64encode(file.getvalue()).decode()}">'


def diagram(sums: Tensor) -> str:
    """The reliability diagram of what `calibration` summed, (3, BINS)."""
    from matplotlib.figure import Figure  # here, as its import takes a second

    accuracy, confidence = (sums[1:] / sums[0]).numpy()  # NaN, not drawn, in an empty bin
    axes = Figure(layout="constrained").subplots(subplot_kw={"xlabel": "confidence", "ylabel": "accuracy"})
    axes.bar([(i + 0.5) / BINS for i in range(BINS)], accuracy, 0.9 / BINS, color="#0072b2", label="accuracy")
    axes.plot(confidence, accuracy, "o", color="#d55e00", label="accuracy at the mean confidence")
    axes.plot((0, 1), (0, 1), "--", color="0.5", label="perfect calibration")
    axes.legend(loc="upper left")
    axes.figure.savefig(file := io.BytesIO(), dpi=150, transparent=True)
    return png(file, "Reliability diagram")


def gallery(mistakes: list[Mistake]) -> str:
    """Images, each above its class, the predicted class and its probability."""
    from matplotlib.image import imsave

    html = ""
    for image, true, predicted, probability in mistakes:
        imsave(file := io.BytesIO(), image.permute(1, 2, 0).contiguous().numpy(), format="png")
        caption = f"{true} → {predicted}, {100 * probability:.1f}&nbsp;%"
        html += f"<figure>{png(file, f'image: {true}')}<figcaption>{caption}</figcaption></figure>"
    return f'<div class="images">{html}</div>'


def pairs(mistakes: list[Mistake]) -> str:
    """The pairs of classes that are confused most often, in either direction, with some of their images."""
    members: dict[tuple[str, ...], list[Mistake]] = {}
    for mistake in mistakes:
        members.setdefault(tuple(sorted(mistake[1:3])), []).append(mistake)
    most = sorted(members.items(), key=lambda item: -len(item[1]))[:SHOWN_PAIRS]
    return "".join(
        f"<div><h3>{one} and {other}: {len(rows)}</h3>{gallery(rows[:IMAGES_PER_PAIR])}</div>"
        for (one, other), rows in most
    )


def scores(logits: Tensor, labels: Tensor) -> str:
    """The first section, for float64 logits (N, 100) and labels (N,): accuracy and calibration."""
    probability, top = logits.softmax(1).topk(5)
    correct = top == labels[:, None]
    rows: list[Row] = []
    for k in (1, 5):
        accuracy = correct[:, :k].any(1).double().mean().item()
        standard_error = 100 * (accuracy * (1 - accuracy) / len(labels)) ** 0.5
        rows.append((f"top-{k} accuracy", accuracy, f"{standard_error:.2f} points"))
    error, sums = calibration(probability[:, 0], correct[:, 0].double())
    rows += [("expected calibration error", error, ""), ("loss", f"{F.cross_entropy(logits, labels).item():.4f}", "")]
    return table(("measure", "value", "standard error"), rows) + diagram(sums)


def fractions(correct: Tensor, group: Tensor) -> list[float]:
    """The fraction of each group (N,) that is correct (N,)."""
    return (group.bincount(correct.double()) / group.bincount()).tolist()


def report(path: Path, data_dir: str = Config.data_dir) -> tuple[str, float]:
    """Grade a checkpoint on its data set's test images. Returns the page, one file of HTML that needs no other, and the
    accuracy in percent. Raises UserError."""
    model, about = open_checkpoint(path)
    images, labels = load_test(about["dataset"], data_dir)
    logits = evaluate.predict_logits(model, images).double()
    confidence, predicted = logits.softmax(1).max(1)
    correct = predicted == labels

    group_of = torch.tensor([i for name in NAMES for i, group in enumerate(SUPERCLASSES.values()) if name in group])
    group = group_of[labels]
    right_group = fractions(group == group_of[predicted], group)
    supers = zip(SUPERCLASSES, fractions(correct, group), right_group, strict=True)
    classes = sorted(zip(NAMES, fractions(correct, labels), strict=True), key=itemgetter(1))
    mistakes = [
        (images[i], NAMES[labels[i]], NAMES[predicted[i]], confidence[i].item())
        for i in confidence.argsort(descending=True).tolist()
        if not correct[i]
    ]
    cost = "Cost: flops = {}, Model parameter size = {:.3f} kB".format(*evaluate.count_cost(model))
    rows = stages(model)
    rows.append(("total", "", *(sum(row[i] for row in rows) for i in (2, 3, 4))))
    sections = {
        "Accuracy": scores(logits, labels),
        "Superclasses": table(("superclass", "class correct", "superclass correct"), sorted(supers, key=itemgetter(1))),
        "Classes": "".join(table(("class", "correct"), classes[i : i + 25]) for i in range(0, len(classes), 25)),
        "Most confused pairs: true → predicted class, probability": pairs(mistakes),
        "Most confident mistakes: true → predicted class, probability": gallery(mistakes[:SHOWN_MISTAKES]),
        cost: table(("stage", "output", "parameters", "bytes", "multiply-adds"), rows),
    }
    main = "".join(f'<h2>{title}</h2><div class="grid">{html}</div>' for title, html in sections.items())
    title = f"{path.name} on {len(labels)} {about['dataset']} test images"
    page = PAGE.substitute(title=escape(title), about=escape(describe_checkpoint(about)), main=main)
    return page, 100 * correct.double().mean().item()


@program("tools.report")
def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m tools.report", description=__doc__)
    evaluate.add_checkpoint(parser)
    parser.add_argument("--output", type=Path, default=Path("report/index.html"), help="page to write [%(default)s]")
    add_data_dir(parser)
    arguments = parser.parse_args(argv)
    page, accuracy = report(arguments.checkpoint, arguments.data_dir)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(arguments.output, lambda file: file.write(page.encode()))
    print(f"{arguments.output}\nAccuracy = {accuracy:.2f} %")


if __name__ == "__main__":
    sys.exit(main())
