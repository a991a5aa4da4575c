"""Embedding a collection: what is written, by numpy, and that a kill changes nothing of it."""

import contextlib
import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
import small_collections as small
import tensorflow as tf
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_collections import embed_program as program

from isd_tf.data import datasets, subsets
from isd_tf.serving import collection as collections
from isd_tf.serving import embed
from isd_tf.serving.collection import Collection, escape, unescape

COUNT = 150
IMAGES = small.random_images(COUNT)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small.export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """150 images of two classes, some with odd names, and three that cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    odd = iter(small.ODD_NAMES)
    for i, image in enumerate(IMAGES):
        name = next(odd, b"") if i % 20 == 7 else b""
        small.write_image(
            folder / ("cat" if i < 70 else "dog"), b"%03d" % i + name + b".png", image
        )
    (folder / "cat" / "010a.png").write_bytes(b"")
    (folder / "dog" / "100a.png").write_bytes(b"hello, this is no picture")
    (folder / "dog" / "100b.png").write_bytes((folder / "dog" / "100.png").read_bytes()[:300])
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    def run(images, model, out, *more):
        flags = [f"--images={images}", f"--model={model}", f"--out={out}", *more]
        small.call(program, *flags, monkeypatch=monkeypatch)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(run, capsys):
    """The sentence that the program ends with."""

    def refused(*arguments):
        with pytest.raises(SystemExit) as ending:
            run(*arguments)
        assert ending.value.code == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said
        return said

    return refused


def number_of(name):
    return int(os.path.basename(name)[:3])


def test_embeddings_are_those_of_numpy_and_all_forms_agree(photos, model, run, tmp_path):
    out = tmp_path / "out"
    said = run(photos, pathlib.Path(model[0]).parent, out)
    assert "153 images of 2 classes" in said and "3 images cannot be read" in said

    embeddings = np.load(out / "embeddings.npy", mmap_mode="r")
    lines = (out / "paths.txt").read_text(encoding="utf-8").splitlines()
    names = [unescape(line) for line in lines]
    assert embeddings.dtype == np.float32 and embeddings.shape == (COUNT, small.DIMENSION)
    assert [number_of(name) for name in names] == list(range(COUNT))
    assert all(os.path.isabs(name) and os.path.exists(name) for name in names)
    expected = [small.embedding_by_numpy(image, model[1]) for image in IMAGES]
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)

    table = pq.read_table(out / "shards")
    assert table.column_names == ["path", "embedding", "width", "height", "label"]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[5]"
    assert table["path"].to_pylist() == lines
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist()), embeddings)
    assert table["label"].to_pylist() == ["cat"] * 70 + ["dog"] * 80

    with open(out / "unreadable.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["row", "path", "reason"]
    assert [(row, os.path.basename(path), reason) for row, path, reason in rows] == [
        ("11", "010a.png", "empty"),
        ("102", "100a.png", "not an image: begins with 'hello, this is no pi'..."),
        ("103", "100b.png", "cut off"),
    ]


def test_sizes_are_those_of_the_upright_image(model, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # A quarter turn.
    image = np.zeros([20, 40, 3], np.uint8)
    turned = small.write_image(tmp_path, "turned.jpg", image, "JPEG", exif=exif)
    tiff = small.write_image(tmp_path, "by_pillow.tif", image, "TIFF")
    dataset = datasets.FileDataset("files", (turned, tiff))
    found = embedded(dataset, model, tmp_path / "out").known()
    assert found["width"].to_pylist() == [20, 40] and found["height"].to_pylist() == [40, 20]


def embedded(dataset, model, out, shards=None):
    encoder = embed.load_encoder(model[0])
    collection = embed.begin(out, encoder, dataset, shard_images=64)
    for numbers in shards or [collection.missing]:
        embed.embed_shards(encoder, dataset, collection, numbers)
    collection.finish()
    return Collection.open(out)


def test_arrays_and_records_have_names_labels_and_the_same_embeddings(model, tmp_path):
    labels, classes = np.arange(COUNT) % 3, ("ant", "bee", "cow")
    arrays = datasets.ArrayDataset("patches/train", IMAGES, labels, classes)
    of_arrays = embedded(arrays, model, tmp_path / "arrays")
    assert of_arrays.names()[149] == "patches/train, image 149"
    assert of_arrays.known()["label"].to_pylist()[:4] == ["ant", "bee", "cow", "ant"]
    expected = [small.embedding_by_numpy(image, model[1]) for image in IMAGES]
    np.testing.assert_allclose(of_arrays.embeddings(), expected, atol=1e-5)

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=classes)}
    )
    files = [str(tmp_path / f"shard{i}") for i in range(2)]
    for file, rows in zip(files, (range(100), range(100, COUNT)), strict=True):
        with tf.io.TFRecordWriter(file) as writer:
            for i in rows:
                record = {"image": IMAGES[i], "label": int(labels[i])}
                encoded = features.serialize_example(features.encode_example(record))
                # One in the second file can be read by nobody.
                writer.write(encoded if i != 120 else encoded.replace(b"PNG", b"XXX"))
    records = datasets.RecordDataset(
        "records", tuple(files), (20, 0), (80, 50), features, "image", "label", classes
    )
    kept = subsets.take(records, np.arange(5, 130), "all but five")
    of_records = embedded(kept, model, tmp_path / "records")
    rows = [row for row in range(25, COUNT) if row != 120]
    expected_names = [f"{files[row // 100]}, record {row % 100}" for row in rows]
    assert of_records.names() == expected_names
    np.testing.assert_array_equal(of_records.embeddings(), of_arrays.embeddings()[rows])
    skipped = (tmp_path / "records" / "unreadable.csv").read_text().splitlines()[1:]
    assert skipped == [f'95,"{files[1]}, record 20",{skipped[0].rsplit(",", 1)[1]}']


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
import program
import pyarrow.parquet as pq
from isd_tf.data import datasets
from isd_tf.serving import embed
write, calls = pq.write_table, []
def write_half(table, path, **options):
    write(table, path, **options)
    calls.append(path)
    if len(calls) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
pq.write_table = write_half
dataset = datasets.load_collection(sys.argv[1])
encoder = embed.load_encoder(sys.argv[2])
collection = embed.begin(sys.argv[3], encoder, dataset, shard_images=64)
embed.embed_shards(encoder, dataset, collection, [1, 2])
"""


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_what_was_killed_continues_to_the_same_files(photos, model, run, tmp_path):
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    arguments = [photos, model[0], killed, pathlib.Path(program.__file__).parent]
    process = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)])
    assert process.returncode == -9
    assert sorted(p.name[:11] for p in (killed / "shards").iterdir()) == [
        "_unfinished",
        "part-00001-",
    ]
    done = killed / "shards" / "part-00001-of-00003.parquet"
    before = done.stat()
    # Both the shard before it and the one after it are missing.
    assert "64 images are done" in run(photos, model[0], killed)
    after = done.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    unbroken.mkdir()
    shutil.copy(killed / "embeddings.json", unbroken)  # Which has the shards' size.
    run(photos, model[0], unbroken)
    assert len(files_of(killed)) == 7 and files_of(killed) == files_of(unbroken)
    assert "are complete" in run(photos, model[0], killed)


def test_names_are_written_in_one_line_and_come_back():
    assert escape("plain \u732b.png") == "plain \u732b.png"
    assert escape(os.fsdecode(b"a\n\xff")) == r"a\n\udcff"


@given(st.binary())
def test_any_name_comes_back(name):
    line = escape(os.fsdecode(name))
    assert len(f"{line}.".splitlines()) == 1 and line.encode() is not None
    assert os.fsencode(unescape(line)) == name


def test_other_content_images_or_models_are_refused(photos, model, run, refused, tmp_path):
    out = tmp_path / "out"
    run(photos / "cat", model[0], out)
    said = refused(photos / "dog", model[0], out)
    assert "of other images: " in said and "Use another --out" in said
    other, _ = small.export(tmp_path / "other", seed=1)
    assert "by another model: linear (digest " in refused(photos / "cat", other, out)
    assert "must be empty, or hold embeddings" in refused(photos, model[0], photos)
    with open(out / ".lock", "w") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        assert "Another process is at work" in refused(photos / "cat", model[0], out)


@pytest.mark.parametrize("content", ["[1, 2]", '{"rows": 7}', "{"])
def test_another_programs_embeddings_are_refused_and_left_alone(
    content, photos, model, refused, tmp_path
):
    (tmp_path / "embeddings.json").write_text(content)
    said = refused(photos / "cat", model[0], tmp_path)
    assert "embeddings.json is damaged" in said or "Received: another program's" in said
    assert [path.name for path in tmp_path.iterdir()] == ["embeddings.json"]


def test_many_that_cannot_be_read_are_a_line_and_a_list(model, run, tmp_path):
    folder, out = tmp_path / "broken", tmp_path / "out"
    small.write_image(folder, "good.png", IMAGES[0])
    for i in range(100):
        (folder / f"{i:04d}.jpg").write_bytes(b"")
    said = run(folder, model[0], out)
    assert "100 images cannot be read" in said and said.count("\n") < 8
    assert len((out / "unreadable.csv").read_text().splitlines()) == 101
    assert np.load(out / "embeddings.npy").shape == (1, small.DIMENSION)


def test_where_nothing_can_be_read_the_list_says_why(tmp_path):
    part = {"name": "x", "sha256": "0"}
    about = {"images": part, "model": part, "count": 5000, "dimension": 3, "shard_images": 4096}
    collection = Collection.begin(tmp_path, about)
    for number in collection.missing:
        rows = collection.rows_of(number)
        skipped = [collections.Skipped(row, f"{row}.jpg", "empty") for row in rows]
        nothing = np.zeros([0, 3]), np.zeros([0, 2], int)
        collection.write_shard(number, collections.Shard([], *nothing, [], skipped))
    with pytest.raises(ValueError, match="None of the 5000 images of x can be read"):
        collection.finish()
    assert collection.missing == [0, 1]  # Once they can be read, the same call reads them.
    assert (tmp_path / "unreadable.csv").read_text().splitlines()[-1] == "4999,4999.jpg,empty"
    assert not collection.is_complete


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("empty", "Found no image below"),
        ("nowhere", "which does not exist"),
        ("parts", "holds parts of a dataset: train, val. Name one"),
        ("parts/val/a.png", "is an image. Write its path into a list"),
        ("tfds:cifar1", "Did you mean cifar10"),
    ],
)
def test_images_that_are_none_are_refused(images, expected, model, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for part in ("train", "val"):
        small.write_image(tmp_path / "parts" / part, "a.png", IMAGES[0])
    source = images if ":" in images else tmp_path / images
    assert expected in refused(source, model[0], tmp_path / "out")


def test_models_that_are_none_are_refused(photos, model, refused, tmp_path):
    out, broken = tmp_path / "out", tmp_path / "broken"
    assert "Expected a SavedModel" in refused(photos, tmp_path, out)
    module = tf.Module()
    module.double = tf.function(lambda x: 2 * x, input_signature=[tf.TensorSpec([1])])
    tf.saved_model.save(module, tmp_path / "double", {"double_it": module.double})
    said = refused(photos, tmp_path / "double", out)
    assert "by its signature `encode`" in said and "double_it" in said

    shutil.copytree(model[0], broken)
    card = json.loads((broken / "model_card.json").read_text())
    card["input"]["image_size"] = 32
    (broken / "model_card.json").write_text(json.dumps(card))
    assert "must take views of the 32 x 32 pixels" in refused(photos, broken, out)
    (broken / "model_card.json").unlink()
    assert "has no model_card.json" in refused(photos, broken, out)


def test_a_model_is_known_again_when_it_is_exported_again(model, tmp_path):
    again, _ = small.export(tmp_path)
    assert embed.load_encoder(again).sha256 == embed.load_encoder(model[0]).sha256


def test_diverged_weights_are_refused(model, tmp_path):
    encoder = embed.load_encoder(model[0])
    diverged = encoder._replace(embed=lambda views: encoder.embed(views) * np.nan)
    dataset = datasets.ArrayDataset("arrays", IMAGES)
    collection = embed.begin(tmp_path / "out", diverged, dataset)
    with pytest.raises(ValueError, match="must be finite"):
        embed.embed_shards(diverged, dataset, collection, [0])
    assert collection.missing == [0]


def test_a_full_disk_leaves_nothing_half(model, tmp_path):
    from small_runs import full_disk

    dataset = datasets.ArrayDataset("arrays", np.repeat(IMAGES, 9, axis=0))
    encoder = embed.load_encoder(model[0])
    collection = embed.begin(tmp_path / "out", encoder, dataset)
    with full_disk(), contextlib.suppress(OSError):
        embed.embed_shards(encoder, dataset, collection, [0])
    assert not list((tmp_path / "out" / "shards").iterdir())


def test_a_batch_fills_a_shard_and_fits_into_the_caches():
    sizes = [embed.batch_size(size, collections.SHARD_IMAGES) for size in (32, 96, 224, 384, 1024)]
    assert sizes == [256, 128, 32, 16, 16] and embed.batch_size(32, 48) == 16


def test_progress_tells_the_rate_and_what_is_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(program, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    with program.Progress(1000, 400) as progress:
        now[0] += 10
        progress(200, 3)
    said = capsys.readouterr().out
    assert "600 of 1000 images, 20 images/s, 20 s left, 3 unreadable" in said
    assert said.count("600 of 1000") == 1
    monkeypatch.setattr(program, "SECONDS_BETWEEN_REPORTS", 0)
    with program.Progress(1000, 400) as progress:
        now[0] += 10
        progress(600, 0)  # Said at once, and not again at the end.
    assert capsys.readouterr().out.count("1000 of 1000") == 1
