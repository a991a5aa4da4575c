"""Finding in embeddings, against numpy's brute force; and the program with its tables and page."""

import base64
import html.parser
import importlib
import io
import os
import pathlib
import re
import shutil

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import small_collections as small
from PIL import Image
from small_collections import search_program as program
from small_collections import search_results
from small_models import unit

from isd_tf.data import datasets
from isd_tf.data.folders import shown
from isd_tf.evaluation import search
from isd_tf.serving import embed
from isd_tf.serving.collection import Collection, escape

RANDOM = np.random.default_rng(0)
ROWS = unit(RANDOM.normal(size=(90, 7))).astype(np.float32)
# Three groups of near-duplicates, one of which is a chain: its ends are not alike.
PLANTED = ROWS.copy()
PLANTED[[20, 50]] = PLANTED[3]
PLANTED[80] = unit(PLANTED[[10]] + 0.05 * unit(PLANTED[[11]]))[0]
for i, row in enumerate((30, 31, 32, 33)):
    PLANTED[row] = unit(np.eye(7, dtype=np.float32)[[0]] * (4 - i) + np.eye(7)[[1]] * i)[0]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """So that few rows take several blocks, the last one in part."""
    monkeypatch.setattr(search, "BLOCK", 16)
    monkeypatch.setattr(search, "QUERIES", 40)
    monkeypatch.setattr(search.knn, "BANK_CHUNK", 32)


@pytest.mark.parametrize("engine", search.ENGINES.values())
@pytest.mark.parametrize("k", [1, 5, 200])
def test_nearest_are_those_of_brute_force(engine, k):
    queries = unit(RANDOM.normal(size=(50, 7))).astype(np.float32)
    rows, similarities = engine(queries, ROWS, k)
    expected = queries @ ROWS.T
    np.testing.assert_array_equal(rows, np.argsort(-expected, axis=1)[:, :k])
    np.testing.assert_allclose(similarities, -np.sort(-expected, axis=1)[:, :k], atol=1e-6)


@pytest.mark.parametrize("engine", search.ENGINES.values())
def test_queries_of_another_dimension_are_refused(engine):
    with pytest.raises(ValueError, match="must have the 7 numbers .* Received: 6"):
        engine(ROWS[:2, :6], ROWS, 1)


def test_an_engine_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match="pip install faiss-cpu"):
        search.nearest_by_faiss(ROWS[:1], ROWS, 1)


def test_a_row_is_not_its_own_neighbour_even_among_many_that_are_the_same():
    same = np.repeat(ROWS[:1], 6, axis=0)
    rows, similarities = search.nearest_to_rows(np.concatenate([same, ROWS[1:4]]), np.arange(9), 3)
    assert rows.shape == (9, 3) and not (rows == np.arange(9)[:, np.newaxis]).any()
    np.testing.assert_allclose(similarities[:6], 1, atol=1e-6)
    assert search.nearest_to_rows(ROWS[:3], np.array([1]), 20)[0].tolist() in ([[0, 2]], [[2, 0]])


def groups_by_hand(rows, threshold):
    similar = rows.astype(np.float64) @ rows.T.astype(np.float64) >= threshold - 1e-6
    groups, seen = [], set()
    for row in range(len(rows)):
        waiting, group = [row], set()
        while waiting:
            member = waiting.pop()
            if member not in seen:
                seen.add(member)
                group.add(member)
                waiting += np.flatnonzero(similar[member]).tolist()
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


@pytest.mark.parametrize("threshold", [0.9, 0.7, 0.3, 1.0])
def test_groups_of_near_duplicates_are_what_similarity_connects(threshold):
    groups = [group.tolist() for group in search.near_duplicates(PLANTED, threshold)]
    assert groups == groups_by_hand(PLANTED, threshold)
    if threshold == 0.9:
        assert [3, 20, 50] in groups and [10, 80] in groups
    if threshold == 0.7:
        assert any({30, 31, 32, 33} <= set(group) for group in groups)
    if threshold == 1.0:
        assert groups == [[3, 20, 50]]


def test_images_that_are_all_the_same_are_one_group():
    (group,) = search.near_duplicates(np.repeat(ROWS[:1], 90, axis=0), 0.99)
    assert group.tolist() == list(range(90))
    assert search.near_duplicates(ROWS[:1], 0.5) == []


def test_outliers_have_the_lowest_mean_similarity_to_their_neighbours():
    similarities = PLANTED @ PLANTED.T
    np.fill_diagonal(similarities, -np.inf)
    expected = -np.sort(-similarities, axis=1)[:, :4].mean(axis=1)
    rows, scores = search.outliers(PLANTED, 6, 4)
    np.testing.assert_array_equal(rows, np.argsort(expected)[:6])
    np.testing.assert_allclose(scores, np.sort(expected)[:6], atol=1e-6)
    with pytest.raises(ValueError, match="need other images"):
        search.outliers(ROWS[:1], 1, 4)


def test_k_centres_are_those_of_a_slow_version():
    chosen = [int(np.argmax(PLANTED @ PLANTED.mean(axis=0)))]
    while len(chosen) < 40:
        nearest = (PLANTED @ PLANTED[chosen].T).max(axis=1)
        nearest[chosen] = np.inf
        chosen.append(int(np.argmin(nearest)))
    rows, similarities = search.k_centres(PLANTED, 40)
    assert rows.tolist() == chosen
    closest = [(PLANTED[row] @ PLANTED[chosen[:i]].T).max() for i, row in enumerate(chosen) if i]
    np.testing.assert_allclose(similarities[1:], closest, atol=1e-6)
    assert sorted(search.k_centres(PLANTED, 1000)[0]) == list(range(90))


# ------------------------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.export(tmp_path_factory.mktemp("model"))[0]


def smooth(seed):
    """A picture that JPEG keeps, unlike noise."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((small.SIZE, small.SIZE), 2))


@pytest.fixture(scope="module")
def embedded(model, tmp_path_factory):
    """Embeddings of pictures, two of them there again as other JPEG files; and of others."""
    root = tmp_path_factory.mktemp("collections")
    for i, name in enumerate(small.ODD_NAMES):
        small.write_image(root / "train", b"%d" % i + name, smooth(i))
    for i in range(7, 12):
        small.write_image(root / "train", f"{i:02d}.png", smooth(i))
    small.write_image(root / "train", "copy of 7.jpg", smooth(7), "JPEG", quality=90)
    small.write_image(root / "test", "also 9.jpg", smooth(9), "JPEG", quality=90)
    small.write_image(root / "test", "new.png", smooth(99))
    encoder = embed.load_encoder(model)
    for part in ("train", "test"):
        dataset = datasets.load_collection(str(root / part))
        source = {"images": str(root / part), "split": "train", "data_dir": None}
        collection = embed.begin(root / f"{part} embedded", encoder, dataset, source)
        embed.embed_shards(encoder, dataset, collection, [0])
        collection.finish()
    return root


@pytest.fixture
def run(embedded, monkeypatch, tmp_path):
    """Runs the program on the embedded pictures; returns its table and page."""

    def run(*flags, part="train"):
        flags = [f"--embeddings={embedded / part} embedded", f"--out={tmp_path / 'out'}", *flags]
        small.call(program, *flags, monkeypatch=monkeypatch)
        (page,) = (tmp_path / "out").glob("*.html")
        table = pq.read_table(page.with_suffix(".parquet"))
        as_csv = pyarrow.csv.read_csv(
            page.with_suffix(".csv"),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        )
        assert as_csv["path"].to_pylist() == table["path"].to_pylist()
        assert as_csv.num_columns == table.num_columns
        return {name: table[name].to_pylist() for name in table.column_names}, Page(
            page.read_text(encoding="utf-8")
        )

    return run


class Page(html.parser.HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.text = [], [], ""
        self.source = text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        # Nothing comes from elsewhere, and nothing runs.
        assert not any(key.startswith("on") for key in attributes)
        assert all(attributes.get(key, "data:").startswith("data:") for key in ("src", "href"))

    def handle_data(self, data):
        self.text += data

    @property
    def alts(self):
        return [os.path.basename(image["alt"]) for image in self.images]


def test_the_nearest_of_a_query_are_its_copies(run, embedded, model):
    table, page = run(f"--query={embedded / 'test' / 'also 9.jpg'}", f"--model={model}")
    assert os.path.basename(table["path"][0]) == "09.png" and table["similarity"][0] > 0.99
    assert table["similarity"] == sorted(table["similarity"])[::-1] and len(table["row"]) == 13
    assert page.alts[:2] == ["also 9.jpg", "09.png"] and len(page.images) == 14


def test_the_nearest_of_a_row_are_found(run):
    table, page = run("--row=8", "--neighbors=3", "--engine=faiss")
    assert list(table) == ["row", "path", "similarity", "label", "width", "height"]
    assert len(table["row"]) == 3 and 8 not in table["row"]


def test_the_same_picture_in_another_file_is_a_near_duplicate(run):
    table, page = run("--near_duplicates=0.99")
    assert [os.path.basename(path) for path in table["path"]] == ["07.png", "copy of 7.jpg"]
    assert page.alts == ["07.png", "copy of 7.jpg"] and table["group"] == [0, 0]
    assert "1 group of images" in page.text


def test_near_duplicates_between_train_and_test_are_named(run, embedded):
    other = embedded / "train embedded"
    table, page = run("--near_duplicates=0.99", f"--against={other}", part="test")
    assert [os.path.basename(path) for path in table["path"]] == ["also 9.jpg"]
    assert [os.path.basename(path) for path in table["other_path"]] == ["09.png"]
    assert page.alts == ["also 9.jpg", "09.png"] and "1 of the 2 images" in page.text


def test_a_page_shows_any_name_as_text_and_every_picture(run, embedded):
    table, page = run("--diverse=13")
    names = sorted(os.listdir(embedded / "train"))
    assert sorted(page.alts) == sorted(map(shown, names))
    assert sorted(os.path.basename(path) for path in table["path"]) == sorted(map(escape, names))
    assert "b" not in page.tags and "script" not in page.tags and "<b>bold" in page.text
    # Nothing turns the letters of what follows around, or ends a line in a name.
    assert "\u202e" not in page.source and "\u2028" not in page.source and r"\u202e" in page.text
    assert not re.search(r"(https?:)?//", page.source.replace("'", '"').split("base64,")[0])
    assert len(page.images) == 13 and "prefers-color-scheme: dark" in page.source
    for image in page.images:
        data = base64.b64decode(image["src"].removeprefix("data:image/jpeg;base64,"))
        picture = Image.open(io.BytesIO(data))
        picture.load()
        assert picture.size == (int(image["width"]), int(image["height"]))


def test_pictures_are_limited_and_large_ones_are_small(run, monkeypatch, embedded):
    monkeypatch.setattr(search_results, "MAX_PICTURES", 4)
    monkeypatch.setattr(search_results, "THUMBNAIL", 8)
    table, page = run("--outliers=6")
    assert (
        len(page.images) == 4
        and "4 of 6 pictures are shown" in page.text
        and len(table["row"]) == 6
    )
    assert "2 more are in the table" in page.text
    assert {(image["width"], image["height"]) for image in page.images} == {("8", "8")}


def test_a_picture_that_is_gone_is_said_to_be(run, embedded):
    path = embedded / "train" / "08.png"
    path.rename(embedded / "moved")
    try:
        _, page = run("--diverse=13")
    finally:
        (embedded / "moved").rename(path)
    assert len(page.images) == 12 and "No picture: no such file" in page.text


@pytest.fixture
def read_as_documented(embedded, tmp_path, monkeypatch):
    """What the lines of docs/find.md read of the embedded pictures."""
    (tmp_path / "embedded").symlink_to(embedded / "train embedded")
    monkeypatch.chdir(tmp_path)
    text = (pathlib.Path(__file__).parent.parent / "docs" / "find.md").read_text()
    names = {}
    exec(compile(text.split("```python\n")[1].split("```")[0], "docs/find.md", "exec"), names)
    lines = re.findall(r"^\| (\w+) \| `(.*?)`", text, re.MULTILINE)
    return names, dict(lines)


def test_the_pages_lines_read_every_name(read_as_documented, embedded):
    names, _ = read_as_documented
    found = {os.fsencode(os.path.basename(path)) for path in names["paths"]}
    assert found == set(os.listdir(os.fsencode(embedded / "train")))
    expected = np.argsort(-names["embeddings"] @ names["embeddings"][0])[:10]
    assert names["nearest"][0] == 0 and names["nearest"].tolist() == expected.tolist()


def test_usearch_reads_the_array(read_as_documented):
    pytest.importorskip("usearch.index")
    names, lines = read_as_documented
    names["usearch"] = importlib.import_module("usearch")
    exec(lines["usearch"], names)
    found = names["index"].search(names["embeddings"][3], 4, exact=True)
    similarities = np.sort(names["embeddings"] @ names["embeddings"][3])[::-1]
    np.testing.assert_allclose(1 - found.distances, similarities[:4], atol=1e-5)


def test_pictures_of_arrays_are_those_of_their_rows(model, tmp_path, monkeypatch):
    images = small.random_images(3)
    arrays = datasets.ArrayDataset("mnist/train", images)
    encoder = embed.load_encoder(model)
    source = {"images": "tfds:mnist", "split": "train", "data_dir": None}
    collection = embed.begin(tmp_path, encoder, arrays, source)
    embed.embed_shards(encoder, arrays, collection, [0])
    collection.finish()
    monkeypatch.setattr(search_results, "_dataset", lambda *source: arrays)
    picture = search_results.Picture(collection, 2, "")
    assert picture.name == "mnist/train, image 2"
    np.testing.assert_array_equal(np.asarray(search_results._open(picture)), images[2])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--row=13"], "--row must be from 0 to 12, as there are 13 embeddings. Received: 13"),
        (["--row=-1"], "Received: -1"),
        (["--diverse=14"], "--diverse must be from 1 to 13"),
        (["--outliers=0"], "--outliers must be at least 1. Received: 0"),
        (["--near_duplicates=1.5"], "must be above 0 and at most 1. Received: 1.5"),
        (["--row=1", "--against=x"], "needs --near_duplicates=T"),
        (["--query=x.png"], "--query and --model go together"),
        (["--near_duplicates=1", "--against=nowhere"], "nowhere, which does not exist"),
        (["--query={root}/nowhere.png", "--model={model}"], "nowhere.png: no such file"),
        (["--query={root}", "--model={model}"], ": a folder"),
        (["--row=1", "--outliers=3"], "not allowed with"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(run, embedded, model, flags, expected, capsys):
    with pytest.raises(SystemExit) as ending:
        run(*(flag.format(root=embedded, model=model) for flag in flags))
    said = capsys.readouterr().err
    assert ending.value.code in (1, 2) and expected in said and "Traceback" not in said


def test_embeddings_of_other_encoders_are_not_compared(run, embedded, tmp_path, capsys):
    other, _ = small.export(tmp_path / "other", seed=1)
    encoder = embed.load_encoder(other)
    dataset = datasets.load_collection(str(embedded / "test"))
    collection = embed.begin(tmp_path / "by other", encoder, dataset)
    with pytest.raises(SystemExit):
        run("--near_duplicates=1", f"--against={collection.folder}")
    assert "are not complete: 1 of 1 shards are missing" in capsys.readouterr().err
    embed.embed_shards(encoder, dataset, collection, [0])
    collection.finish()
    query = f"--query={embedded / 'test' / 'new.png'}"
    for flags in (
        ["--near_duplicates=1", f"--against={collection.folder}"],
        [query, f"--model={other}"],
    ):
        with pytest.raises(SystemExit):
            run(*flags)
        assert "if one encoder has made them" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["embeddings.npy", "shards/part-00000-of-00001.parquet"])
@pytest.mark.parametrize("left", [0, 100, -20])
def test_a_damaged_file_is_named_with_what_helps(
    name, left, embedded, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "damaged"
    shutil.copytree(embedded / "train embedded", folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:left])
    flags = [f"--embeddings={folder}", "--row=0"]
    with pytest.raises(SystemExit):
        small.call(program, *flags, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert f"{name} is damaged: " in said and "Remove it" in said and said.count("\n") == 1
    # As it says: what is left makes the files again, or says which part is missing.
    (folder / name).unlink()
    (folder / "embeddings.npy").unlink(missing_ok=True)
    again = Collection._read(folder)
    if not again.missing:
        again.finish()
        assert (folder / "embeddings.npy").read_bytes() == whole
    else:
        assert again.missing == [0] and not again.is_complete
