"""Write one HTML page on what a checkpoint gets right, gets wrong and costs: python -m tools.report."""

import io
import sys
from base64 import b64encode
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

import evaluate
from config import Config, OneLineParser
from tools.analysis import Mistake, Results, analyse, wilson
from utils import atomic_write, program

PAGE = Template("""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>$model on $dataset</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>table { width: 100%; border-spacing: 0 }
:root { color-scheme: light dark; font: 1rem/1.4 sans-serif } p { overflow-wrap: anywhere } [role] { overflow-x: auto }
@media (prefers-color-scheme: dark) { .grid > img { filter: invert(1) hue-rotate(180deg) } } h3, figure { margin: 0 }
body { max-width: 75rem; margin: auto; padding: 1rem } figure img { width: 6rem; image-rendering: pixelated }
th, td { padding: .2rem .5rem; border-bottom: 1px solid #8886; text-align: right } th:first-child { text-align: left }
td { background: linear-gradient(#0072b255 0 0) 0/var(--bar) no-repeat; min-width: 5rem; white-space: nowrap }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 1rem 1.5rem }
.images { display: flex; flex-wrap: wrap; gap: 4px } figure { width: 6rem; font-size: .8rem } img { max-width: 100% }
</style></head><body><h1>$model on the $dataset test set</h1><p>$source</p><main>$main</main></body></html>""")
SHOWN_PAIRS, SHOWN_MISTAKES, IMAGES_A_PAIR = 12, 12, 4


def render(results: Results) -> str:
    """The page: one file of HTML that needs no other."""
    columns = [results.classes[i : i + 25] for i in range(0, len(results.classes), 25)]
    cost = f"flops = {results.operations}, Model parameter size = {results.size_kb:.3f} kB"
    total = ("total", "", *(sum(stage[i] for stage in results.stages) for i in (2, 3, 4)))
    sections = {
        "Accuracy": accuracy(results) + diagram(results.plain.bins, results.scaled and results.scaled.bins),
        "Superclasses": table(("superclass", "class correct", "superclass correct"), *results.superclasses),
        "Classes": "".join(table(("class", "correct"), *rows) for rows in columns),
        "Most confused pairs: true → predicted class, probability": pairs(results.mistakes),
        "Most confident mistakes: true → predicted class, probability": gallery(results.mistakes[:SHOWN_MISTAKES]),
        f"Cost: {cost}": table(("stage", "output", "parameters", "bytes", "operations"), *results.stages, total),
    }
    sections |= {title: table(*map(tuple, cells)) for title, cells in results.latency.items()}
    main = "".join(
        f'<h2>{title} ({results.dataset})</h2><div class="grid">{html}</div>' for title, html in sections.items()
    )
    return PAGE.substitute(model=results.model, dataset=results.dataset, source=escape(results.source), main=main)


def accuracy(results: Results) -> str:
    """The first table, and a sentence on the temperature."""
    text = f"There is no temperature: {results.temperature_source}."
    if results.temperature is not None:
        text = (
            f"The temperature {results.temperature:.4f}, {results.temperature_source}, divides all logits of an image "
            "(Guo et al., 2017). It changes confidences only: the order of the classes stays, and with it the "
            "accuracy. The probabilities further down are without it."
        )
    return f"<div>{table(('measure', 'value', '95 % interval (Wilson)'), *scores(results))}<p>{text}</p></div>"


def scores(results: Results) -> list[tuple[str, str | float, str]]:
    """The rows of the first table: measure, value, interval."""
    rows = []
    for k, correct in ((1, results.top1), (5, results.top5)):
        low, high = wilson(correct, results.images)
        rows.append((f"top-{k} accuracy", correct / results.images, f"{low:.2f} to {high:.2f} %"))
    rows += [("expected calibration error", results.plain.error, ""), ("loss", f"{results.plain.loss:.4f}", "")]
    if results.scaled:
        rows.append(("expected calibration error, with temperature", results.scaled.error, ""))
        rows.append(("loss, with temperature", f"{results.scaled.loss:.4f}", ""))
    return rows


def table(head: tuple[str, ...], *rows: tuple[str | int | float, ...]) -> str:
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


def diagram(sums: Tensor, scaled: Tensor | None = None) -> str:
    """The reliability diagram of what `calibration` summed, (3, bins), perhaps with a temperature too."""
    bins, (accuracy, confidence) = sums.shape[1], (sums[1:] / sums[0]).numpy()  # NaN, not drawn, in an empty bin
    axes = Figure(layout="constrained").subplots(subplot_kw={"xlabel": "confidence", "ylabel": "accuracy"})
    axes.bar([(i + 0.5) / bins for i in range(bins)], accuracy, 0.9 / bins, color="#0072b2", label="accuracy")
    axes.plot(confidence, accuracy, "o", color="#d55e00", label="accuracy at the mean confidence")
    if scaled is not None:
        accuracy, confidence = (scaled[1:] / scaled[0]).numpy()
        label = "the same, with temperature"
        axes.plot(confidence, accuracy, "D", ms=9, color="#009e73", markeredgecolor="white", label=label)
    axes.plot((0, 1), (0, 1), "--", color="0.5", label="perfect calibration")
    axes.legend(loc="upper left")
    axes.figure.savefig(file := io.BytesIO(), dpi=150, transparent=True)
    return png(file, "Reliability diagram")


def gallery(mistakes: list[Mistake]) -> str:
    """Images, each above its class, the predicted class and that one's probability."""
    html = ""
    for mistake in mistakes:
        imsave(file := io.BytesIO(), mistake.image.permute(1, 2, 0).contiguous().numpy(), format="png")
        caption = f"{mistake.true} → {mistake.predicted}, {100 * mistake.probability:.1f}&nbsp;%"
        html += f"<figure>{png(file, f'image: {mistake.true}')}<figcaption>{caption}</figcaption></figure>"
    return f'<div class="images">{html}</div>'


def pairs(mistakes: list[Mistake]) -> str:
    """The pairs of classes that are confused most often, in either direction, with some of their images."""
    members: dict[tuple[str, ...], list[Mistake]] = {}
    for mistake in mistakes:
        members.setdefault(tuple(sorted((mistake.true, mistake.predicted))), []).append(mistake)
    most = sorted(members.items(), key=lambda item: -len(item[1]))[:SHOWN_PAIRS]
    return "".join(
        f"<div><h3>{one} and {other}: {len(rows)}</h3>{gallery(rows[:IMAGES_A_PAIR])}</div>"
        for (one, other), rows in most
    )


@program("tools.report")
def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: checkpoints/best.pth if there, else published.pth")
    parser.add_argument("--output", type=Path, default="report/index.html", help="page to write [%(default)s]")
    parser.add_argument("--data_dir", default=Config.data_dir, help="folder of the data set [%(default)s]")
    arguments = parser.parse_args(argv)
    results = analyse(arguments.checkpoint or evaluate.default_checkpoint(), arguments.data_dir)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(arguments.output, lambda file: file.write(render(results).encode()))
    print(f"{arguments.output}\nAccuracy = {100 * results.top1 / results.images:.2f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
