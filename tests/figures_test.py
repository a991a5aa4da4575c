import numpy as np
import pytest
from PIL import Image

from isd_tf.evaluation.neighbors import QueueNeighbors
from isd_tf.report import figures
from isd_tf.views.photometric import CHANNEL_MEAN, CHANNEL_STD

PALETTE = [(230, 20, 20), (20, 200, 20), (20, 20, 220), (220, 200, 30), (120, 30, 160)]


def view(color):
    """A view of one colour."""
    pixels = np.full((8, 8, 3), color, np.float32) / 255
    return ((pixels - CHANNEL_MEAN) / CHANNEL_STD).astype(np.float32)


def pixels_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def centre(pixels, color, tolerance=4):
    """Where on the picture (x, y, as shares) the pixels of a colour lie on average."""
    rows, columns = np.nonzero(np.abs(pixels - color).max(axis=2) <= tolerance)
    assert len(rows) > 100, f"There is nothing of {color}."
    return columns.mean() / pixels.shape[1], rows.mean() / pixels.shape[0]


def test_clusters_are_rows_of_their_members(tmp_path):
    members = [[view(PALETTE[0]), view(PALETTE[1])], [view(PALETTE[2])]]
    figures.draw_clusters(members, tmp_path / "figures" / "clusters.png")
    pixels = pixels_of(tmp_path / "figures" / "clusters.png")
    (x0, y0), (x1, y1), (x2, y2) = (centre(pixels, color) for color in PALETTE[:3])
    assert x0 < 0.5 < x1 and x2 < 0.5
    assert y0 == pytest.approx(y1, abs=0.02) and y0 < 0.5 < y2
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["clusters.png"]


@pytest.mark.parametrize("labelled", [True, False])
def test_neighbors_stand_beside_their_query_framed_by_class(labelled, tmp_path):
    label = np.array([1, 0]) if labelled else np.array([-1, -1])
    neighbors = QueueNeighbors(
        query_views=np.array([view(PALETTE[0]), view(PALETTE[0])]),
        other_views=np.array([view(PALETTE[1]), view(PALETTE[1])]),
        anchor_views=np.array([[view(PALETTE[2]), view(PALETTE[3])]] * 2),
        probabilities=np.array([[0.7, 0.2], [0.6, 0.1]]),
        query_labels=label,
        anchor_labels=np.array([[1, 0], [1, 0]]) if labelled else np.full((2, 2), -1),
    )
    figures.draw_neighbors(neighbors, tmp_path / "neighbors.png", ("cat", "dog"))
    pixels = pixels_of(tmp_path / "neighbors.png")
    columns = [centre(pixels, color)[0] for color in PALETTE[:4]]
    assert columns == sorted(columns) and len(set(columns)) == 4
    frames = [tuple(int(figures.COLORS[i][j : j + 2], 16) for j in (1, 3, 5)) for i in (2, 1)]
    for frame in frames:
        count = (np.abs(pixels - frame).max(axis=2) <= 4).sum()
        assert count > 100 if labelled else count == 0


def test_what_is_written_and_drawn(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    views = np.array([view(PALETTE[0])])
    figures.draw_neighbors(
        QueueNeighbors(
            views, views, views[np.newaxis].repeat(2, 1), np.array([[0.75, 0.125]]),
            np.array([1]), np.array([[1, 0]]),
        ),
        tmp_path,
        ("cat", "dog"),
    )  # fmt: skip
    texts = [axis.texts[0].get_text() for axis in drawn[0].axes]
    assert texts == ["query\ndog", "not compared\nMoCo 1", "ISD 0.75\nMoCo 0", "ISD 0.12\nMoCo 0"]
    figures.draw_curves(
        {"a": {"student": ([1, 2], [0.1, 0.2]), "teacher": ([1, 2], [0.3, 0.4])}}, ""
    )
    student, teacher = drawn[1].axes[0].lines
    np.testing.assert_allclose(student.get_ydata(), [10, 20])
    np.testing.assert_allclose(teacher.get_ydata(), [30, 40])
    assert (student.get_linestyle(), teacher.get_linestyle()) == ("--", "-")
    assert student.get_label() == "a, student" and student.get_color() == teacher.get_color()


@pytest.mark.filterwarnings("error")
def test_names_are_no_formulas_and_missing_letters_cost_no_warnings(tmp_path):
    views, name = np.array([view(PALETTE[0])]), "$\\frac $x_1$ \N{GRINNING FACE}\N{SNOWMAN}"
    anchors = views[np.newaxis].repeat(2, 1)
    found = QueueNeighbors(views, views, anchors, np.ones((1, 2)), np.array([0]), np.zeros((1, 2)))
    figures.draw_neighbors(found, tmp_path / "neighbors.png", (name,))
    curves = {name: {"student": ([1], [0.1]), "teacher": ([1], [0.3])}}
    figures.draw_curves(curves, tmp_path / "curves.png")
    assert (pixels_of(tmp_path / "neighbors.png") < 60).all(axis=2).sum() > 100


def test_curves_of_student_and_teacher_are_drawn_for_every_run(tmp_path):
    curve = ([4, 8], [0.5, 0.75])
    runs = {f"run {i}": {"student": curve, "teacher": ([4, 8], [0.6, 0.7])} for i in range(3)}
    figures.draw_curves(runs, tmp_path / "curves.png")
    pixels = pixels_of(tmp_path / "curves.png")
    for color in figures.COLORS[:3]:
        rgb = [int(color[j : j + 2], 16) for j in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(axis=2) <= 40).sum() > 20
    rgb = [int(figures.COLORS[4][j : j + 2], 16) for j in (1, 3, 5)]
    assert (np.abs(pixels - rgb).max(axis=2) <= 4).sum() == 0
