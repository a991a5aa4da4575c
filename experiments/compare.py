"""Lays runs beside each other: compare.html, one page with curves, recipes and scores.

    python experiments/compare.py runs/quickstart runs/quickstart_moco_v2
    python experiments/compare.py runs/isd_seed* runs/moco_seed* --out=isd_and_moco.html

Runs whose recipes differ in nothing but the seed are one group: of groups, means and deviations are
shown, and of two groups with the same seeds the differences seed by seed.
"""

import pathlib
from typing import NamedTuple

import program
from absl import flags
from program import say

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "compare.html", "The page to write.")
# Flags that say where a run is and how it is watched, not what it is.
NOT_COMPARED = "workdir stages data_dir tfds_data_dir compare_with log_every_steps".split()
SEEDS = ("seed", "unbalanced_seed")
# What is compared beside the flags: digests of what they name.
IMAGES, TEACHER = "images (digest)", "teacher (digest)"
# Figures that only say how fast this machine was.
NOT_SCORES = ("step", "learning_rate", "pretrain_seconds_since_start")
workdirs_ = []


def read_flags(command_line):
    arguments = FLAGS(command_line)[1:]
    if not arguments:
        raise ValueError("Name the workdirs of some runs. Received: none.")
    workdirs_.extend(pathlib.Path(argument) for argument in arguments)


if __name__ == "__main__":
    program.begin(read_flags)

program.import_tensorflow()
import numpy as np  # noqa: E402
import settings  # noqa: E402
import workdirs  # noqa: E402

from isd_tf.data.folders import shown  # noqa: E402
from isd_tf.report import charts, pages  # noqa: E402
from isd_tf.report.charts import Line  # noqa: E402
from isd_tf.report.figures import COLORS  # noqa: E402
from isd_tf.report.pages import Section, Table  # noqa: E402
from isd_tf.training import metrics  # noqa: E402


class Compared(NamedTuple):
    """A run that is compared."""

    name: str
    recipe: dict[str, str]
    scores: dict[str, float]
    metrics: metrics.Metrics

    @property
    def seed(self) -> tuple:
        return tuple(self.recipe.get(name) for name in SEEDS)

    @property
    def group(self) -> tuple:
        others = set(settings.NOT_RECIPE) - {"unbalanced", "test_split"} | set(SEEDS)
        if "unbalanced" in self.recipe:
            others.add(IMAGES)  # Each seed draws its own.
        return tuple(sorted((k, v) for k, v in self.recipe.items() if k not in others))


def main():
    runs = [read(workdir) for workdir in workdirs_]
    write(runs, pathlib.Path(FLAGS.out))
    say(f"Page to look at: {FLAGS.out}")


def read(workdir: pathlib.Path) -> Compared:
    """Reads what a run has left.

    Raises:
        FileNotFoundError: when the folder is no workdir.
        ValueError: when a file of it cannot be read.
    """
    if not (workdir / "run.flags").exists():
        raise FileNotFoundError(
            f"{shown(str(workdir))} is not the workdir of a run: it has no run.flags."
        )
    about = workdirs.about(workdir)
    flags_ = [line.removeprefix("--").partition("=") for line in about["recipe"]]
    recipe = dict(_value(*flag) for flag in flags_)
    recipe = {name: value for name, value in recipe.items() if name not in NOT_COMPARED}
    for name, file in ((IMAGES, "data"), (TEACHER, "teacher")):
        if file in about:
            recipe[name] = str(about[file]["digest"])
    found = metrics.read(workdir / workdirs.METRICS)
    scores = found.newest_accuracies() | {
        name: float(value)
        for name, value in about.get("scores", {}).items()
        if isinstance(value, int | float) and name not in NOT_SCORES
    }
    return Compared(shown(str(workdir)), recipe, scores, found)


def _value(name, equals, value):
    """Name and value of a line of a flag file; a switch is --compile or --nocompile."""
    if equals:
        return name, value
    return (name[2:], "false") if name.startswith("no") else (name, "true")


def write(runs: list[Compared], path: pathlib.Path) -> None:
    """Writes the page."""
    groups = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    groups = list(groups.values())
    sections = [curves(runs), recipes(runs), scores(runs)]
    if len(groups) < len(runs):
        sections.append(of_groups(groups))
    if len(groups) == 2:
        sections.append(by_seed(*groups))
    page = pages.render(
        "compare.html.jinja",
        title=f"{len(runs)} runs",
        headline=headline(groups),
        sections=[section for section in sections if section],
    )
    pages.write(page, path)


def headline(groups):
    said = []
    for group in groups:
        values = [run.scores["student_1nn"] for run in group if "student_1nn" in run.scores]
        if values:
            more = f" and {len(group) - 1} more seeds" * (len(group) > 1)
            said.append(f"{group[0].name}{more}: {np.mean(values):.1%}")
    without = [run.name for group in groups for run in group if "student_1nn" not in run.scores]
    if not said:
        return "None of the runs is scored."
    text = f"1-NN of the students: {'; '.join(said)}."
    return text + f" Not scored: {', '.join(without)}." * bool(without)


def curves(runs):
    drawn = []
    for title, name, kind, percent in (
        ("1-NN accuracy of the student", "student_1nn", "epochs", True),
        ("1-NN accuracy of the teacher", "teacher_1nn", "epochs", True),
        ("Loss", "loss", "epochs", False),
        ("Entropy of the teacher's similarities (nats)", "teacher_entropy", "epochs", False),
        ("Spread of the embeddings", "embedding_std", "epochs", False),
        ("Length of the gradient", "gradient_norm", "epochs", False),
        ("Images a second", "images_per_second", "epochs", False),
    ):
        lines = []
        for number, run in enumerate(runs):
            x, y = run.metrics.curve(name, kind)
            if len(x):
                lines.append(Line(run.name, x, y, number, number >= len(COLORS) - 1))
        if lines:
            drawn.append(charts.chart(title, lines, percent=percent))
    without = [run.name for run in runs if not run.metrics.epochs]
    text = f"Without {workdirs.METRICS}, so without curves: {', '.join(without)}." * bool(without)
    return Section("Curves", text, charts=drawn)


def recipes(runs):
    names = sorted({name for run in runs for name in run.recipe})
    values = {name: [run.recipe.get(name, "-") for run in runs] for name in names}
    rows = [
        (name, *map(shown, of_runs)) for name, of_runs in values.items() if len(set(of_runs)) > 1
    ]
    if not rows:
        return Section("Recipes", "They are the same.")
    table = Table(("flag", *(run.name for run in runs)), rows)
    return Section("Recipes", "What differs.", tables=[table])


def scores(runs):
    names = sorted({name for run in runs for name in run.scores})
    header, rows = ("score", *(run.name for run in runs)), []
    for name in names:
        values = [run.scores.get(name) for run in runs]
        row = [name, *("-" if value is None else value for value in values)]
        if len(runs) == 2:
            row.append("-" if None in values else values[1] - values[0])
        rows.append(row)
    header += ("second less first",) * (len(runs) == 2)
    return Section("Scores", tables=[Table(header, rows)] if rows else ())


def of_groups(groups):
    names = sorted({name for group in groups for run in group for name in run.scores})
    header, rows = ["score"], []
    for group in groups:
        header += [f"{group[0].name}, mean of {len(group)}", "deviation"]
    for name in names:
        row = [name]
        for group in groups:
            values = [run.scores[name] for run in group if name in run.scores]
            row.append(float(np.mean(values)) if values else "-")
            row.append(float(np.std(values, ddof=1)) if len(values) > 1 else "-")
        rows.append(row)
    return Section(
        "Groups", "Runs that differ in nothing but the seed.", tables=[Table(header, rows)]
    )


def by_seed(first, second):
    """The differences of two groups, seed by seed."""
    one, other = ({run.seed: run.scores for run in group} for group in (first, second))
    seeds = [seed for seed in one if seed in other]
    if len(seeds) < 2:
        return None
    rows = []
    for name in sorted(set.union(*(set(one[seed]) & set(other[seed]) for seed in seeds))):
        both = [seed for seed in seeds if name in one[seed] and name in other[seed]]
        if len(both) < 2:
            continue
        differences = [other[seed][name] - one[seed][name] for seed in both]
        error = float(np.std(differences, ddof=1) / np.sqrt(len(both)))
        rows.append((name, float(np.mean(differences)), error, len(both)))
    text = f"{second[0].name} and its group less {first[0].name} and its group, seed by seed."
    header = ("score", "mean difference", "standard error", "seeds")
    return Section("Differences by seed", text, tables=[Table(header, rows)])


if __name__ == "__main__":
    program.run(main)
