"""The page of a run, as its files and as a browser shows them."""

import html
import json
import pathlib
import re
import shlex
import shutil
import sys
import types

import numpy as np
import pytest
import tensorflow as tf

from isd_tf.data import datasets
from isd_tf.evaluation import features
from isd_tf.report import pages
from isd_tf.training import metrics

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "experiments"))

import report_images  # noqa: E402
import reporting  # noqa: E402
import run  # noqa: E402
import run_data  # noqa: E402
import workdirs  # noqa: E402
from in_process import call  # noqa: E402
from small_runs import small_run  # noqa: E402

NAMES = {"dark": "<b>x & $1_$2", "light": "\N{GRINNING FACE} \N{HEBREW LETTER ALEF}"}


def text_of(page):
    """What a page says, without its markup, pictures and charts."""
    page = re.sub(r"<(script|style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def copied(photos, folder, names):
    for split in ("train", "val"):
        for name, new in names.items():
            shutil.copytree(photos / split / name, folder / split / new)
    return folder


@pytest.fixture(scope="module")
def pages_written(photos, tmp_path_factory):
    """The workdir of a run, and what each page said that was written during it."""
    folder = copied(photos, tmp_path_factory.mktemp("photos <i>"), NAMES)
    dark = NAMES["dark"]
    shutil.copy(folder / "train" / dark / "1.png", folder / "val" / dark / "1.png")
    workdir, said, write = tmp_path_factory.mktemp("page") / "run <u>", [], pages.write

    def remember(page, path):
        said.append(text_of(page))
        write(page, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "write", remember)
        stages = "--stages=pretrain,evaluate,report"
        call(*small_run(folder, workdir, stages, "--knn_every_epochs=2"))
    return workdir, said


@pytest.fixture(scope="module")
def workdir(pages_written):
    return pages_written[0]


@pytest.fixture(scope="module")
def page(workdir):
    return (workdir / "report.html").read_text()


def test_the_page_says_first_what_the_run_has_come_to(workdir, page):
    results = json.loads((workdir / "results.json").read_text())
    text = text_of(page)
    assert "ISD has trained tiny_resnet on the 24 images of" in text and "4 of 4 epochs." in text
    for name, key in (("test images by its student (raw pixels", "raw_pixels"),
                      ("the untrained encoder", "untrained")):  # fmt: skip
        assert f"{name} {results[f'{key}_1nn']:.1%}" in text
    assert f"the class of {results['student_1nn']:.1%} of the test images" in text
    assert text.index("of the test images by") < text.index("Health") < text.index("Curves")
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == [
        "Health", "Curves", "Student and teacher", "Views", "Neighbours", "Near-duplicates",
        "Anchors", "Clusters", "Map", "Confusion", "Scores", "Recipe", "Commands",
    ]  # fmt: skip
    assert "Left out" not in text and len(page) < 5e6


def test_names_are_text_everywhere(page):
    assert "<b>x" not in page and "run <u>" not in page
    assert NAMES["dark"] in text_of(page) and NAMES["light"] in text_of(page)


def test_the_copied_test_image_is_found_and_shown(page):
    text = text_of(page)
    assert "Some test images are training images too" in text and "1 byte for byte" in text
    assert "1 of 8 test images look the same as the one nearest to them among 24 images of" in text


def test_every_score_and_flag_is_in_a_table(workdir, page):
    text = text_of(page)
    for name, value in json.loads((workdir / "results.json").read_text()).items():
        assert name in text and f"{value:.4g}" in text
    assert "tiny_resnet" in text and "learning_rate" in text and "tensorflow" in text
    for command in (
        "experiments/run.py --flagfile=",
        f"finetune.py --encoder={shlex.quote(str(workdir))} --dataset=folder '--data_dir=",
        "--evaluations=knn,fast_linear",
        "To embed images or to serve, export first",
    ):
        assert command in text


def test_the_confusion_counts_what_the_nearest_are(workdir, page):
    """Against brute force on the features that the run has kept."""
    found = {}
    for place in (workdir / "features").iterdir():
        labels = np.load(place / "labels_and_rows.npy")[:, 0]
        values = np.fromfile(place / "values.float32", np.float32).reshape(len(labels), -1)
        found[len(labels)] = values / np.linalg.norm(values, axis=1, keepdims=True), labels
    (bank, known), (asked, labels) = found[24], found[8]
    predicted = known[np.argmax(asked @ bank.T, axis=1)]
    expected = [[int(((labels == i) & (predicted == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    (table,) = re.findall(r'<table class="confusion">.*?</table>', page, re.DOTALL)
    counts = list(map(int, re.findall(r"<td[^>]*>(\d+)</td>", table)))
    assert counts == sum(expected, [])


def test_tensorboard_gets_pictures_and_features(workdir):
    logs = workdir / "logs"
    pictures = {}
    for path in logs.glob("*.pictures*"):
        for record in tf.compat.v1.io.tf_record_iterator(str(path)):
            for value in tf.compat.v1.Event.FromString(record).summary.value:
                assert value.metadata.plugin_data.plugin_name == "images"
                width, height, encoded = tf.make_ndarray(value.tensor)
                image = tf.io.decode_png(encoded)
                assert image.shape[:2] == (int(height), int(width)) and image.numpy().std() > 10
                pictures[value.tag] = image
    assert pictures.keys() == {"views", "neighbours"}
    values, names = np.loadtxt(logs / "features.tsv"), (logs / "names.tsv").read_text().splitlines()
    assert len(values) == len(names) == 8 and set(names) == set(NAMES.values())
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 1, rtol=1e-4)
    config = (logs / "projector_config.pbtxt").read_text()
    assert all(
        (logs / name).exists() for name in re.findall(r'(?:path|image_path): "(.*?)"', config)
    )


def test_pages_of_a_training_say_how_far_it_is(pages_written):
    _, said = pages_written
    steps = [re.search(r"after step (\d+)( of 24)?", page)[0] for page in said]
    assert steps == [
        "after step 6 of 24", "after step 12 of 24", "after step 24 of 24", "after step 24"
    ]  # fmt: skip
    assert "is not scored yet" in said[0] and "by its student (raw pixels" in said[1]
    assert "Neighbours An image" not in said[2] and "Neighbours An image" in said[3]


@pytest.mark.slow
def test_without_labels_there_is_everything_that_needs_none(photos, tmp_path):
    shutil.copytree(photos / "train" / "dark", tmp_path / "images" / "2024")
    settings = ["--queue_size=8", "--epochs=2", "--stages=pretrain,report"]
    call(*small_run(tmp_path / "images", tmp_path / "run", *settings))
    text = text_of((tmp_path / "run" / "report.html").read_text())
    assert "for 2 of 2 epochs. images has no labels." in text.replace(f"{tmp_path}/", "")
    assert "Confusion Left out: the images have no labels." in text
    assert text.count("Left out") == 1 and "Neighbours An image, and those nearest" in text
    assert "12 images of" in text and "Near-duplicates" not in text
    # Commands that would fail for this run are not offered.
    assert "--evaluations=knn,fast_linear" not in text and "embed.py" not in text
    assert "export first" in text and "labelled images of yours" in text


@pytest.mark.slow
def test_a_part_that_fails_says_why_and_costs_no_other(workdir, tmp_path, monkeypatch):
    """And a line that a kill has cut off costs that line."""

    def fail(*arguments):
        raise ValueError("no room for <clusters>")

    monkeypatch.setattr(report_images.clusters, "cluster", fail)
    copy = shutil.copytree(workdir, tmp_path / "copy")
    lines = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines[:-9])
    call(*small_run(workdirs.flag(workdir, "data_dir"), copy, "--stages=report"))
    text = text_of((copy / "report.html").read_text())
    assert "Clusters Left out: no room for <clusters>" in text
    assert text.count("Left out") == 1 and "Confusion What the nearest" in text
    assert "Some lines of the metrics cannot be read" in text and "1 lines" in text


def test_a_workdir_without_metrics_has_no_curves(monkeypatch):
    monkeypatch.setattr(reporting, "FLAGS", types.SimpleNamespace(method="isd"))
    page = object.__new__(reporting._Page)
    page.run, page.metrics = types.SimpleNamespace(model=None), metrics.Metrics([], [], 0)
    assert "There is nothing in metrics.jsonl" in page.curves().text
    assert not page.curves().charts
    page.metrics = metrics.Metrics([], [{"epoch": 1.0, "step": 6, "loss": 2.0}], 0)
    assert len(page.curves().charts) == 1 and not page.curves().text  # Of less than a logged step.


NO_ROWS = None, None


def test_one_class_is_not_confused():
    seen = object.__new__(report_images.Seen)
    seen.run = types.SimpleNamespace(data=types.SimpleNamespace(test=True))
    seen.asked = seen.searched = report_images.Sample(
        "one", None, None, np.zeros(4, int), *NO_ROWS, 4
    )
    seen.nearest = np.zeros((4, 1), int), None
    assert seen.confusion("Confusion").text == "Left out: there is one class."


@pytest.mark.parametrize("count, how", [(3, "main directions"), (5, "main"), (12, "t-SNE")])
def test_few_images_have_a_map_too(count, how):
    plane, said = report_images._plane(np.random.default_rng(0).normal(size=(count, 8)))
    assert plane.shape == (count, 2) and plane.min() == 0 and plane.max() == 1 and how in said


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_features_that_are_all_the_same_have_no_map(value):
    with pytest.raises(ValueError, match="All images have the same features"):
        report_images._plane(np.full((64, 16), value))


def test_without_a_test_split_images_of_all_classes_ask(monkeypatch):
    monkeypatch.setattr(report_images, "FLAGS", types.SimpleNamespace(seed=0))
    monkeypatch.setattr(report_images, "ASKED", 50)
    seen, labels = object.__new__(report_images.Seen), np.repeat(np.arange(10), 10)
    bank = types.SimpleNamespace(class_names=())
    seen.run = types.SimpleNamespace(data=types.SimpleNamespace(test=None, bank=bank))
    seen.searched = report_images.Sample(
        "bank", None, np.eye(10, dtype=np.float32)[labels], labels, *NO_ROWS, 100
    )
    counts = np.array(seen.confusion("Confusion").confusion.counts)
    assert counts.sum() == 50 and np.diag(counts).min() > 0 and np.trace(counts) == 50


def test_of_a_part_rows_are_those_of_the_whole_dataset(monkeypatch):
    monkeypatch.setattr(report_images, "FLAGS", types.SimpleNamespace(seed=0))
    seen = object.__new__(report_images.Seen)
    seen.student = None

    def found(encoder, part):  # Of each image its first pixel; the third cannot be read.
        rows = np.delete(np.arange(len(part)), 2)
        return features.Features(part.images[rows, 0, 0, :1], part.labels[rows], rows)

    seen.run = types.SimpleNamespace(features=found)
    images = np.arange(1, 101, dtype=np.uint8).reshape(100, 1, 1, 1) * np.ones((1, 1, 1, 3), int)
    whole = datasets.ArrayDataset("whole", images.astype(np.uint8), np.arange(100))
    sample = seen.sample(whole, 30)
    assert len(sample.numbers) == 29 and len(sample.dataset) == 30 and sample.of == 100
    np.testing.assert_array_equal(sample.numbers, sample.labels)


def test_a_page_that_cannot_be_written_ends_no_training(monkeypatch, caplog, capsys):
    def fail(*arguments):
        raise OSError(28, "No space left on device", "report.html")

    monkeypatch.setattr(report_images, "views_of", fail)
    refresh = reporting.Refresh(None, 24, 1, lambda: False)
    refresh.on_train_begin()
    refresh.on_epoch_end(0)
    assert "report.html cannot be written: [Errno 28] No space left" in caplog.text
    monkeypatch.setattr(reporting, "write", fail)
    monkeypatch.setattr(run_data, "all_steps", lambda train: 24)
    data = types.SimpleNamespace(train=range(24))
    (said,) = run.report(types.SimpleNamespace(data=data))
    assert said.startswith("The report failed: [Errno 28] No space left on device")


def test_of_many_classes_the_pairs_confused_most_are_shown():
    """10 000 classes, of which 7 is taken for 8 three times and 3 for 9999 twice."""
    seen = object.__new__(report_images.Seen)
    labels = np.array([7, 7, 7, 3, 3, *range(100, 200)])
    nearest = np.array([8, 8, 8, 9999, 9999, *range(100, 200)])
    data = types.SimpleNamespace(test=True, bank=types.SimpleNamespace(class_names=()))
    seen.run = types.SimpleNamespace(data=data)
    seen.asked = report_images.Sample("few", None, None, labels, *NO_ROWS, len(labels))
    seen.searched = report_images.Sample("many", None, nearest, np.arange(10_000), *NO_ROWS, 10_000)
    seen.nearest = nearest[:, np.newaxis], None
    (table,) = seen.confusion("Confusion").tables
    assert table.rows == [("class 7", "class 8", 3), ("class 3", "class 9999", 2)]


# ------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("Needs Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def opened(browser, path):
    browser.get(path.as_uri())
    messages = [json.loads(x["message"])["message"] for x in browser.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in asked if not url.startswith("data:")]


def test_the_page_needs_nothing_but_itself(browser, workdir, page):
    assert opened(browser, workdir / "report.html") == [(workdir / "report.html").as_uri()]
    assert browser.get_log("browser") == []
    script = "return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt])"
    images = browser.execute_script(script)
    assert len(images) > 50 and all(done and width and alt for done, width, alt in images)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_can_be_read_on_a_phone_and_in_the_dark(browser, workdir, width, dark):
    """Nothing wider than the window; text stands out by 4.5 from its ground, as WCAG asks."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    opened(browser, workdir / "report.html")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    colors = browser.execute_script(
        "return ['body', '.note', '.quiet', '.good .level', '.warning .level', 'figcaption'].map("
        "s => getComputedStyle(document.querySelector(s)).color)"
    )
    ground, card = browser.execute_script(
        "return [document.body, document.querySelector('.health li')].map("
        "e => getComputedStyle(e).backgroundColor)"
    )
    for color in colors:
        assert min(contrast(color, ground), contrast(color, card)) >= 4.5, (color, ground, card)


def contrast(*colors):
    lights = []
    for color in colors:
        parts = np.array(list(map(int, re.findall(r"\d+", color)[:3]))) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        lights.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(lights) / min(lights)


def test_tables_sort_by_number_and_by_name(browser, workdir):
    opened(browser, workdir / "report.html")
    browser.execute_script("window.scores = document.querySelector('#scores table')")
    values = "return [...scores.tBodies[0].rows].map(r => Number(r.cells[1].dataset.value))"
    for direction in (1, -1):
        browser.execute_script("scores.querySelectorAll('th button')[1].click()")
        found = browser.execute_script(values)
        assert found == sorted(found, reverse=direction == -1) and len(found) > 10


def test_a_dot_on_the_map_shows_its_image(browser, workdir):
    """The sprite's tile under the dot is the evaluation view of that image."""
    opened(browser, workdir / "report.html")
    sizes = browser.execute_script(
        "const dot = document.querySelectorAll('.map i')[3], small = dot.offsetWidth; dot.focus();"
        "const style = getComputedStyle(dot);"
        "return [small, dot.offsetWidth, style.backgroundImage.slice(0, 16), style.backgroundSize]"
    )
    assert sizes == [9, 80, 'url("data:image/', "300% 300%"]
