"""Pictures of a run: the paper's figures 1 to 3, as PNG files."""

import os
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from isd_tf.evaluation.neighbors import QueueNeighbors
from isd_tf.views import photometric

# A person sees no more of one image, and no grid needs more pixels.
INCHES_PER_IMAGE = 1.1
# Colours that remain apart for the colour-blind: Okabe and Ito, 2008.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_neighbors(
    neighbors: QueueNeighbors, path: str | os.PathLike, class_names: Sequence[str] = ()
) -> None:
    """Draws the nearest anchors of some images: what ISD's student is to learn, and what MoCo's.

    A row an image: its view for the teacher, its other view, and the anchors, the nearest first.
    Below each stands the teacher's probability, and the target of contrastive learning, which is 1
    for the other view and 0 for every anchor, however alike. Source: paper figure 1.

    Args:
        neighbors: what to draw.
        path: of the PNG file.
        class_names: of the labels; frames tell the anchors of the image's class from others.
    """
    count, shown = neighbors.probabilities.shape
    figure, axes = _grid(count, 2 + shown, INCHES_PER_IMAGE * 1.45)
    for i in range(count):
        label = neighbors.query_labels[i]
        name = class_names[label] if class_names and label >= 0 else ""
        _show(axes[i, 0], neighbors.query_views[i], f"query\n{name}")
        if neighbors.other_views is not None:
            _show(axes[i, 1], neighbors.other_views[i], "not compared\nMoCo 1")
        for j in range(shown):
            text = f"ISD {neighbors.probabilities[i, j]:.2g}\nMoCo 0"
            known = label >= 0 and neighbors.anchor_labels[i, j] >= 0
            same = neighbors.anchor_labels[i, j] == label
            frame = (COLORS[2] if same else COLORS[1]) if known else None
            _show(axes[i, 2 + j], neighbors.anchor_views[i, j], text, frame)
    title = "An image, its other view, and the anchors nearest to it, with what the student learns"
    if (neighbors.anchor_labels >= 0).any():
        title += "\n(frame: green around the image's class, orange around others)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    _save(figure, path)


def draw_clusters(members: Sequence[Sequence[np.ndarray]], path: str | os.PathLike) -> None:
    """Draws members of clusters, a row a cluster. Source: paper figure 3.

    Args:
        members: for each cluster some normalised views [S, S, 3].
        path: of the PNG file.
    """
    figure, axes = _grid(len(members), max(map(len, members)), INCHES_PER_IMAGE)
    for row, views in zip(axes, members, strict=True):
        for axis, view in zip(row, views, strict=False):
            _show(axis, view)
    _save(figure, path)


def draw_curves(
    curves: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]], path: str | os.PathLike
) -> None:
    """Draws 1-NN accuracy over the epochs, a colour a run, the student dashed.

    Args:
        curves: by run, and then by "student" and "teacher": epochs and accuracies in [0, 1].
        path: of the PNG file.

    Source: paper figure 2.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for i, (run, encoders) in enumerate(curves.items()):
        for encoder, (epochs, accuracies) in encoders.items():
            axis.plot(
                epochs,
                100 * np.asarray(accuracies),
                color=COLORS[i % len(COLORS)],
                linestyle={"teacher": "-", "student": "--"}[encoder],
                marker="o",
                markersize=3,
                label=f"{run}, {encoder}",
            )
    axis.set_xlabel("epoch")
    axis.set_ylabel("1-NN accuracy (%)")
    axis.grid(alpha=0.3)
    for text in axis.legend(fontsize=8).get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def _grid(rows, columns, height):
    figure = Figure(figsize=(INCHES_PER_IMAGE * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes


def _show(axis, view, text="", frame=None):
    axis.imshow(photometric.denormalize(view))
    place = {"transform": axis.transAxes, "ha": "center", "va": "top"}
    # No name of a class is a formula.
    axis.text(0.5, -0.04, text, fontsize=7, parse_math=False, **place)
    if frame:
        side = np.array(view.shape[:2]) - 1
        axis.plot(*_box(side), color=frame, linewidth=2, clip_on=False)


def _box(side):
    height, width = side
    return [-0.5, width + 0.5, width + 0.5, -0.5, -0.5], [
        -0.5,
        -0.5,
        height + 0.5,
        height + 0.5,
        -0.5,
    ]


def _save(figure, path):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside and renamed: whoever looks meanwhile sees a whole picture.
    unfinished = path.with_name(f"unfinished-{path.name}")
    with warnings.catch_warnings():
        # One for each letter that the font has not: the picture shows a box there.
        warnings.filterwarnings("ignore", r"Glyph .* missing")
        figure.savefig(unfinished, dpi=110)
    os.replace(unfinished, path)
