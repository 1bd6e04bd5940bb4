"""Write one HTML page on what a checkpoint gets right, gets wrong and costs: python -m tools.report."""

import copy
import io
import sys
from base64 import b64encode
from collections import Counter
from html import escape
from pathlib import Path
from string import Template

import thop
import torch
from matplotlib import figure, image
from torch import Tensor, nn

import checkpoint
import data
import evaluate
from config import Config, OneLineParser
from tools.labels import SUPERCLASSES, class_names, human

PAGE = Template("""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>MobileNetV3 on $dataset</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>table { width: 100%; border-spacing: 0 }
:root { color-scheme: light dark; font: 1rem/1.4 sans-serif } p { overflow-wrap: anywhere } [role] { overflow-x: auto }
@media (prefers-color-scheme: dark) { .grid > img { filter: invert(1) hue-rotate(180deg) } } h3, figure { margin: 0 }
body { max-width: 75rem; margin: auto; padding: 1rem } figure img { width: 6rem; image-rendering: pixelated }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #8886; text-align: right } th:first-child { text-align: left }
td { background: linear-gradient(#0072b255 0 0) 0/var(--bar) no-repeat; min-width: 5rem; white-space: nowrap }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1rem 1.5rem }
.images { display: flex; flex-wrap: wrap; gap: 4px } figure { width: 6rem; font-size: .8rem } img { max-width: 100% }
</style></head><body><h1>MobileNetV3 on the $dataset test set</h1><p>$source</p><main>$main</main></body></html>""")


def wilson(hits: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of a share in percent, for 95 % unless told otherwise (Wilson, 1927)."""
    centre, spread = hits + z * z / 2, z * (hits * (count - hits) / count + z * z / 4) ** 0.5
    return 100 * (centre - spread) / (count + z * z), 100 * (centre + spread) / (count + z * z)


def calibration(confidence: Tensor, correct: Tensor, bins: int = 15) -> tuple[float, Tensor]:
    """Expected calibration error (Guo et al., 2017); each bin's images, correct ones, summed confidence, (3, bins)."""
    places = (confidence * bins).ceil().long().clamp(1, bins) - 1  # bin m: above m / bins, up to (m + 1) / bins
    sums = torch.stack([places.bincount(weight, bins) for weight in (torch.ones_like(correct), correct, confidence)])
    return ((sums[1] - sums[2]).abs().sum() / len(places)).item(), sums


def reliability(sums: Tensor) -> str:
    """Reliability diagram of what `calibration` summed, as HTML."""
    bins, (accuracy, confidence) = sums.shape[1], (sums[1:] / sums[0]).numpy()  # NaN, not drawn, in an empty bin
    axes = figure.Figure(layout="constrained").subplots(subplot_kw={"xlabel": "confidence", "ylabel": "accuracy"})
    axes.bar([(i + 0.5) / bins for i in range(bins)], accuracy, 0.9 / bins, color="#0072b2", label="accuracy")
    axes.plot(confidence, accuracy, "o", color="#d55e00", label="accuracy at the mean confidence")
    axes.plot((0, 1), (0, 1), "--", color="0.5", label="perfect calibration")
    axes.legend(loc="upper left")
    axes.figure.savefig(png := io.BytesIO(), dpi=150, transparent=True)
    return f'<img alt="Reliability diagram" src="data:image/png;base64,{b64encode(png.getvalue()).decode()}">'


def gallery(mistakes: list[tuple[Tensor, str, str, float]]) -> str:
    """Images, uint8 (3, 32, 32), above their true class, the predicted one and its probability."""
    html = ""
    for pixels, true, guess, p in mistakes:
        image.imsave(png := io.BytesIO(), pixels.permute(1, 2, 0).contiguous().numpy(), format="png")
        html += f'<figure><img alt="image: {true}" src="data:image/png;base64,{b64encode(png.getvalue()).decode()}">'
        html += f"<figcaption>{true} → {guess}, {100 * p:.1f}&nbsp;%</figcaption></figure>"
    return f'<div class="images">{html}</div>'


def table(*rows: tuple[str | int | float, ...]) -> str:
    """Headings, then rows of a name, texts, counts, and shares of 0..1 drawn as bars; it scrolls by itself."""
    html = "".join(f'<th scope="col">{name}</th>' for name in rows[0])
    for name, *values in rows[1:]:
        html += f'</tr><tr><th scope="row">{name}</th>'
        for v in values:
            html += f'<td style="--bar: {v:.1%}">{100 * v:.2f} %</td>' if isinstance(v, float) else f"<td>{v}</td>"
    return f'<div role="region" tabindex="0" aria-label="{rows[0][0]}"><table><tr>{html}</tr></table></div>'


def stages(network: nn.Module) -> list[tuple[str, str, int, int, int]]:
    """Name, output shape for one 3x32x32 image, parameters, bytes with buffers, thop operations; and their total."""
    parts = {"stem": network.stem} | {f"block {i}": block for i, block in enumerate(network.blocks, start=1)}
    parts |= {"head": network.head, "classifier": nn.Sequential(network.pool, nn.Flatten(), network.classifier)}
    rows, x = [], torch.zeros(1, 3, 32, 32)
    for name, part in parts.items():
        operations, parameters = thop.profile(copy.deepcopy(part), (x,), verbose=False)
        x = part(x).detach()
        rows.append((name, "x".join(map(str, x.shape[1:])), int(parameters), evaluate.size(part), int(operations)))
    return [*rows, ("total", "", *(sum(row[i] for row in rows) for i in (2, 3, 4)))]


def build(path: Path, data_dir: str = Config.data_dir) -> tuple[str, float]:
    """The page on a checkpoint, and its accuracy in percent; raises CheckpointError, DataError."""
    content = checkpoint.load(path)
    network, dataset = evaluate.load_network(content, path), content["config"]["dataset"]
    images, labels = data.load_test(Config(dataset=dataset, data_dir=data_dir))
    logits = evaluate.logits(network, images).double()
    top, count = logits.softmax(1).topk(5), len(labels)
    hits, confidence, guesses = top.indices == labels[:, None], top.values[:, 0], top.indices[:, 0]
    names = class_names(dataset)
    shapes = {f"shape {s}": names[10 * s : 10 * s + 10] for s in range(10)}
    groups = shapes if dataset == "synthetic" else SUPERCLASSES
    kin = torch.tensor([i for name in names for i, members in enumerate(groups.values()) if name in members])
    correct, related = hits[:, 0].double(), (kin[labels] == kin[guesses]).double()
    right = [(k, int(hits[:, :k].sum())) for k in (1, 5)]
    scores = [(f"top-{k} accuracy", n / count, "{:.2f} to {:.2f} %".format(*wilson(n, count))) for k, n in right]
    (error, sums), loss = calibration(confidence, correct), nn.functional.cross_entropy(logits, labels)
    scores += [("expected calibration error", error, ""), ("loss", f"{loss:.4f}", "")]
    classes = [(name, correct[labels == i].mean().item()) for i, name in enumerate(names)]
    supers = [(name, *(x[kin[labels] == i].mean().item() for x in (correct, related))) for i, name in enumerate(groups)]
    classes, supers = (sorted(rows, key=lambda row: row[1]) for rows in (classes, supers))
    order = [i for i in confidence.argsort(descending=True).tolist() if not hits[i, 0]]
    wrong = [(images[i], names[labels[i]], names[guesses[i]], confidence[i].item()) for i in order]
    pairs = ""
    for (a, b), n in Counter(tuple(sorted(row[1:3])) for row in wrong).most_common(12):
        pairs += f"<div><h3>{a} and {b}: {n}</h3>{gallery([row for row in wrong if {a, b} == {*row[1:3]}][:4])}</div>"
    cost = "flops = {}, Model parameter size = {:.3f} kB".format(*evaluate.measure(network))
    parts = {
        "Accuracy": table(("measure", "value", "95 % interval (Wilson)"), *scores) + reliability(sums),
        "Superclasses": table(("superclass", "class correct", "superclass correct"), *supers),
        "Classes": "".join(table(("class", "correct"), *classes[i : i + 25]) for i in range(0, 100, 25)),
        "Most confused pairs: true → predicted class, probability": pairs,
        "Most confident mistakes: true → predicted class, probability": gallery(wrong[:12]),
        f"Cost: {cost}": table(("stage", "output", "parameters", "bytes", "operations"), *stages(network)),
    }
    source = f"Checkpoint {path}, experiment {content['config']['experiment']}, epoch {content['epoch']}, "
    source += f"written {content['date']}, graded on {count} {dataset} test images"
    main = "".join(f'<h2>{title} ({dataset})</h2><div class="grid">{html}</div>' for title, html in parts.items())
    return PAGE.substitute(dataset=dataset, source=escape(source), main=human(main)), 100 * correct.mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: the one that evaluate.py grades")
    parser.add_argument("--output", type=Path, default="report/index.html", help="[%(default)s]")
    parser.add_argument("--data_dir", default=Config.data_dir, help="folder of the data set [%(default)s]")
    arguments = parser.parse_args(argv)
    try:
        page, accuracy = build(arguments.checkpoint or evaluate.default_checkpoint(), arguments.data_dir)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(arguments.output, lambda file: file.write(page.encode()))
    except (checkpoint.CheckpointError, data.DataError, OSError, ValueError) as error:
        print(f"tools.report: error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.output}\nAccuracy = {accuracy:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
