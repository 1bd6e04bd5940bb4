"""The report's experiments: what it claims, held against what was measured, for tools/results.py."""

from tools.records import EXPERIMENTS, Record, Records, accuracy
from tools.tables import NOT_MEASURED, link, noise, percent, table

MEMORISED = 95  # % of its own training images that a run gets right in an epoch
FEW_POINTS = 5  # in which the fractions agree


def experiments_table(records: Records) -> str:
    """The report's experiments side by side; what was claimed and what was measured in columns of their own."""
    rows = []
    for run in (records[name] for name in EXPERIMENTS):
        config, claim = run["config"], run["claimed"]
        recipe = [config["epochs"], f"{config['lr_step']}, {config['lr_gamma']:g}", f"{config['dropout']:g}"]
        claimed = percent(claim["accuracy"]) + " (last epoch)" * (claim["epoch"] == "last")
        figures = [percent(accuracy(run, part)) for part in ("train", "validation", "test")]
        measured = [run["best_epoch"] or NOT_MEASURED, *figures, link(run["log"], "log")]
        rows.append([f"`{run['name']}`", *recipe, claimed, *measured])
    head = "name | epochs | StepLR step, gamma | dropout | claimed, unpublished file | measured: best epoch"
    return table(f"{head} | train | validation | official test set | log", rows)


def curves(records: Records) -> str:
    """The curves of each experiment, or that there are none."""
    lines = []
    for run in (records[name] for name in EXPERIMENTS):
        shown = f"!{link(run['curves'], run['name'] + ': loss and accuracy over epochs')}"
        lines.append(shown if run["curves"] else f"`{run['name']}`: {NOT_MEASURED}.")
    return "\n\n".join(lines)


def memorises(run: Record) -> str:
    """Whether a run ends with its training images memorised and its validation loss above its lowest."""
    if not run["history"]:
        return f"- `{run['name']}`: {NOT_MEASURED}."
    last, lowest = run["history"][-1], min(run["history"], key=lambda row: row["validation_loss"])
    holds = last["train_accuracy"] > MEMORISED and last["validation_loss"] > lowest["validation_loss"]
    return (
        f"- `{run['name']}`: train {percent(last['train_accuracy'])}, loss {last['train_loss']:.4f};\n"
        f"  validation {percent(last['validation_accuracy'])}, loss {last['validation_loss']:.4f} "
        f"(lowest {lowest['validation_loss']:.4f}, epoch {lowest['epoch']}).\n"
        f"  {'It holds' if holds else 'It does not hold'}."
    )


def compare(run: Record, base: Record) -> str:
    """What a run gains over another: in the report's claims, and in test accuracy."""
    claimed = run["claimed"]["accuracy"] - base["claimed"]["accuracy"]
    text = f"- `{run['name']}` against `{base['name']}`: claimed {claimed:+.2f} points;"
    if missing := [f"`{other['name']}`" for other in (run, base) if not other["test"]]:
        return f"{text} {NOT_MEASURED} ({' and '.join(missing)})."
    ours, theirs = accuracy(run, "test"), accuracy(base, "test")
    gain = ours - theirs
    outcome = "The direction holds" if gain * claimed > 0 else "The opposite holds"
    if run["test"] == base["test"]:
        outcome = "Equal: all their test figures are the same"
    elif abs(gain) < noise(run, base):
        outcome = f"Too small to tell: two standard errors are {noise(run, base):.2f} points"
    return f"{text}\n  measured {gain:+.2f} points, {percent(ours)} against {percent(theirs)}. {outcome}."


def fraction(claimed: float, seen: float, held_out: float) -> float:
    """f in claimed = f * seen + (1 - f) * held_out."""
    return (claimed - held_out) / (seen - held_out)


def fractions(records: Records) -> str:
    """The fraction f of each experiment, and whether those that are known agree.

    Where a run's weights were not scored on their training images, its log's running accuracy stands in for it.
    """
    rows, known, tests = [], [], []
    for run in (records[name] for name in EXPERIMENTS):
        claimed, seen, running, test = (accuracy(run, part) for part in ("claimed", "train_eval", "train", "test"))
        figures = [claimed, running if seen is None else seen, test]
        value = None if None in figures else 100 * fraction(*figures)
        if value is not None:
            known.append(value)
            tests.append(run["test"])
        cells = [percent(figure) for figure in figures]
        cells[1] += " (running)" * (seen is None and running is not None)
        rows.append([f"`{run['name']}`", *cells, percent(value)])
    text = f"{len(known)} of {len(EXPERIMENTS)} fractions can be computed"
    if any(test != tests[0] for test in tests):  # runs of the same weights say nothing of each other
        apart = max(known) - min(known)
        text += f". They lie between {min(known):.1f} and {max(known):.1f} %, {apart:.1f} points apart:\n"
        if apart <= FEW_POINTS:
            text += f"they agree within {FEW_POINTS} points, so one f fits all claims"
        else:
            text += f"they do not agree within {FEW_POINTS} points, so no single f fits all claims"
    head = "name | claimed, unpublished file | measured: own training images | official test set | f"
    return f"{table(head, rows)}\n\n{text}."
