"""Charts, pictures and pages, as their files."""

import base64
import io
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from isd_tf.report import charts, pages, tensorboard
from isd_tf.report.charts import Level, Line

SVG = "{http://www.w3.org/2000/svg}"


def drawn(*arguments, **how):
    """A chart, as XML with the names that HTML knows by itself."""
    names = f'<svg xmlns="{SVG[1:-1]}" xmlns:xlink="http://www.w3.org/1999/xlink" '
    svg = str(charts.chart(*arguments, **how)).replace("<svg ", names, 1)
    return xml.etree.ElementTree.fromstring(svg)


def line_of(svg, color):
    """The points of the line of a colour, in the chart's units."""
    (path,) = [
        x for x in svg.iter(f"{SVG}path")
        if color.lower() in x.get("style", "").lower() and "L" in x.get("d") and x.get("clip-path")
    ]  # fmt: skip
    return np.array(re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path.get("d")), float)


def test_a_line_goes_where_its_values_go():
    x = np.arange(1, 6.0)
    svg = drawn("Loss", [Line("loss", x, 10 - x)])
    points = line_of(svg, charts.COLORS[0])
    # Evenly to the right, and evenly down: an SVG counts from the top.
    np.testing.assert_allclose(np.diff(points[:, 0]), np.diff(points[:, 0])[0], rtol=1e-3)
    np.testing.assert_allclose(np.diff(points[:, 1]), np.diff(points[:, 1])[0], rtol=1e-3)
    assert np.diff(points[:, 0])[0] > 0 and np.diff(points[:, 1])[0] > 0


def test_a_chart_takes_the_pages_colours_and_says_its_ends():
    lines = [Line("<a>", np.array([1, 2.0]), np.array([0.25, 0.5])),
             Line("$x_1$", np.array([1, 2.0]), np.array([0.1, 0.2]), 1, True)]  # fmt: skip
    svg = drawn("Accuracy & more", lines, [Level("raw", 0.3)], percent=True)
    said = "Accuracy & more: <a> 25.0% to 50.0%; $x_1$ 10.0% to 20.0%"
    assert svg.get("aria-label") == said and svg.get("role") == "img" and svg.get("viewBox")
    text = "".join(svg.itertext())
    assert "<a>" in text and "$x_1$" in text and "raw" in text and "%" in text
    source = charts.chart("x", lines)
    assert "currentColor" in source and charts.INK not in source and "#000000" not in source
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)


def test_long_curves_are_thinned_to_the_means_of_their_parts():
    y = np.arange(3 * charts.MAX_POINTS, dtype=float)
    x, thinned = charts._thinned(y, y)
    np.testing.assert_allclose(thinned, y.reshape(-1, 3).mean(axis=1))
    np.testing.assert_allclose(x, thinned)


def test_the_axis_on_the_right_is_a_share_of_the_scale():
    line = Line("loss", np.array([1, 2.0]), np.array([1.0, 4.0]))
    text = "".join(drawn("Loss", [line], scale=Level("log K", 5.0)).itertext())
    assert "share of log K" in text and "80%" in text.replace(".0%", "%")


def pixels_of(uri):
    encoded = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)


def test_pictures_keep_small_images_and_reduce_large_ones():
    image = np.full((20, 30, 3), (200, 10, 90), np.uint8)
    small = pages.picture(image, "alt")
    assert (small.width, small.height) == (30, 20)
    assert np.abs(pixels_of(small.data) - image[0, 0]).max() <= 4
    large = pages.picture(np.kron(image, np.ones((20, 20, 1), np.uint8)), "alt", side=60)
    assert (large.width, large.height) == (60, 40)
    assert np.abs(pixels_of(large.data) - image[0, 0]).max() <= 4


@pytest.mark.parametrize("count, shape", [(1, (1, 1)), (2, (2, 1)), (4, (2, 2)), (5, (3, 2))])
def test_a_sprite_is_a_grid_row_by_row(count, shape):
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * 40 + np.zeros(
        (8, 8, 3), np.uint8
    )
    grid, columns, rows = pages.sprite(images)
    assert (columns, rows) == shape and grid.size == (8 * columns, 8 * rows)
    for i in range(count):
        assert grid.getpixel((i % columns * 8 + 4, i // columns * 8 + 4)) == (40 * i,) * 3


def test_a_page_is_written_whole_whatever_its_names_hold(tmp_path):
    pages.write("name \udce9 \N{SNOWMAN}", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == r"name \udce9 " + "\N{SNOWMAN}"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_names_of_the_projector_are_a_line_each(tmp_path):
    names = ["a\nb", "", "\udce9\tx"]
    sprite = Image.new("RGB", (16, 8))
    tensorboard.write_projector(tmp_path, np.eye(3), names, sprite, 8)
    assert (tmp_path / "names.tsv").read_text("utf-8").splitlines() == ["a b", "-", r"\udce9 x"]
    np.testing.assert_array_equal(np.loadtxt(tmp_path / "features.tsv"), np.eye(3))
