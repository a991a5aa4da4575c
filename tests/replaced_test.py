"""Images that cannot be read: what comes in their place, and where they end a training."""

import re
import time

import numpy as np
import pytest
import tensorflow as tf
from numbered_images import (
    IMAGES,
    SIZE,
    N,
    labels_of,
    numbered_files,
    prepare_records,
    take,
)
from PIL import Image

from isd_tf.data import batches as batching
from isd_tf.data import datasets
from isd_tf.data.decoding import Unreadable, explaining


@pytest.fixture
def files(tmp_path):
    return numbered_files(tmp_path)


def test_an_unreadable_file_is_replaced_by_the_next_in_order_and_shifts_nothing(files, resizer):
    whole = take(files, 10)
    order = tf.random.experimental.index_shuffle(np.arange(N), np.int64([1, 0]), N - 1).numpy()
    broken = order[6]
    with open(files.paths[broken], "wb") as file:
        file.write(b"broken")

    unreadable = Unreadable(N, 0.1)
    batches = take(files, 10, unreadable=unreadable)

    assert unreadable.names == {files.paths[broken]}
    assert labels_of(batches)[6] == order[7]
    intact = labels_of(whole) != broken
    np.testing.assert_array_equal(labels_of(batches)[intact], labels_of(whole)[intact])
    for name in ("teacher_view", "student_view"):
        ours, theirs = (np.concatenate([b[name] for b in run]) for run in (batches, whole))
        np.testing.assert_array_equal(ours[intact], theirs[intact])
        assert np.isfinite(ours).all()


def test_unreadable_files_are_not_tolerated_unless_allowed(files, resizer):
    with open(files.paths[0], "wb") as file:
        file.write(b"broken")
    unreadable = Unreadable(N, 0.0)
    with pytest.raises(ValueError, match="At most 0.0%.* 1 of 23, for example .*/00.png"):
        with explaining([unreadable]):
            take(files, 12, unreadable=unreadable)


@pytest.mark.parametrize("ahead", [1, 40])
def test_the_limit_ends_the_training_at_the_same_batch_however_far_is_read_ahead(
    files, ahead, monkeypatch, resizer
):
    """Three broken of 23: two are allowed. Batches of one, in an order that is known."""
    order = tf.random.experimental.index_shuffle(np.arange(N), np.int64([1, 0]), N - 1).numpy()
    broken = [files.paths[order[place]] for place in (2, 9, 16)]
    for path in broken:
        with open(path, "wb") as file:
            file.write(b"broken")
    monkeypatch.setattr(batching, "PREFETCHED_BATCHES", ahead)
    unreadable, taken = Unreadable(N, 0.1), 0
    batches = batching.pretraining_batches(files, ("weak", "weak"), SIZE, 1, 1, 0, unreadable)
    examples = ", ".join(sorted(broken))
    with pytest.raises(ValueError, match=f"10.0%.*: 3 of 23, for example {re.escape(examples)}. "):
        with explaining([unreadable]):
            for _ in batches:
                taken += 1
                if taken == 5:
                    time.sleep(0.5)  # Long enough to read all ahead.
                    assert ahead == 1 or len(unreadable.names) > 1
                assert len(unreadable.met_before(taken)) == int(taken > 2) + int(taken > 9)
    assert taken == 16


def test_an_unreadable_record_is_replaced_by_the_next(tmp_path, resizer):
    records = prepare_records(tmp_path / "whole")
    (tmp_path / "broken.png").write_bytes(b"broken")
    broken = prepare_records(tmp_path / "tfds", str(tmp_path / "broken.png"))
    unreadable = Unreadable(N, 0.5)
    # Six epochs, most of which meet number 7.
    ours, theirs = labels_of(take(broken, 30, unreadable=unreadable)), labels_of(take(records, 30))
    assert 7 in theirs and 7 not in ours
    np.testing.assert_array_equal(ours[theirs != 7], theirs[theirs != 7])
    places = [place for place in np.flatnonzero(theirs == 7) if place % 20 < 19]
    for place in places:
        assert ours[place] == theirs[place + 1]
    assert places
    # Named by its place in the files, so that it is counted once in all epochs.
    (name,) = unreadable.names
    assert re.search(r"numbered_images-train.tfrecord-0000\d-of-00004, record \d$", name)


def test_a_broken_last_record_of_an_epoch_is_replaced_too(tmp_path, resizer):
    (tmp_path / "broken.png").write_bytes(b"broken")
    broken = prepare_records(tmp_path / "tfds", str(tmp_path / "broken.png"))
    # With batches of 1 an epoch has no remainder: in 40 epochs number 7 is last at times.
    labels = labels_of(take(broken, N * 40, batch=1, unreadable=Unreadable(N, 0.5)))
    assert 7 not in labels


def broken_records(folder, kept):
    """Records that are broken but for the first `kept`."""
    (folder / "broken.png").write_bytes(b"broken")
    return prepare_records(folder / "tfds", str(folder / "broken.png"), range(kept, N))


def broken_files(folder, kept):
    """One broken file, all but `kept` times."""
    (folder / "broken.png").write_bytes(b"broken")
    Image.fromarray(IMAGES[0]).save(folder / "whole.png")
    paths = [str(folder / "whole.png")] * kept + [str(folder / "broken.png")] * (N - kept)
    return datasets.FileDataset("files", tuple(paths))


@pytest.mark.parametrize(
    ("kind", "limit", "expected"),
    [
        (broken_files, 0.05, "2 in a row that cannot, .*/broken.png, .*/broken.png. Repair"),
        (broken_records, 0.99, r"4 in a row that cannot, .*-00004, record \d, .*, .*, .*. Repair"),
        (broken_records, 0.0, r"At most 0.0%.*: \d+ of 23, for example .*-00004, record \d"),
    ],
)
def test_a_place_without_a_readable_candidate_ends_the_training(tmp_path, kind, limit, expected):
    unreadable = Unreadable(N, limit)
    with pytest.raises(ValueError, match=expected), explaining([unreadable]):
        take(kind(tmp_path, kept=5), 12, unreadable=unreadable)


def test_no_more_images_are_tried_for_a_place_than_may_be_unreadable_and_one(files):
    """Of a million broken ones all would be, at each place."""
    for path in files.paths:
        with open(path, "wb") as file:
            file.write(b"broken")
    unreadable, context = Unreadable(N, 0.1), tf.distribute.InputContext(2, 0, 2)
    take(files, 1, batch=2, unreadable=unreadable, input_context=context)
    order = tf.random.experimental.index_shuffle(np.arange(N), np.int64([1, 0]), N - 1).numpy()
    assert unreadable.met_before(1) == [files.paths[i] for i in order[:3]]


def test_of_a_disk_that_is_gone_not_all_files_are_tried(tmp_path):
    gone = datasets.FileDataset("files", tuple(str(tmp_path / f"{i}.png") for i in range(500)))
    unreadable = Unreadable(500, 0.9)
    with pytest.raises(ValueError, match="64 in a row that cannot"), explaining([unreadable]):
        take(gone, 1, unreadable=unreadable)


@pytest.mark.parametrize("kind", [broken_files, broken_records])
def test_of_several_workers_none_ends_alone(tmp_path, kind):
    """They count together: `CountUnreadable` asks each for what it has met up to a step."""
    unreadable, context = Unreadable(N, 0.0), tf.distribute.InputContext(2, 0, 2)
    take(kind(tmp_path, kept=5), 12, unreadable=unreadable, input_context=context)
    assert unreadable.met_before(12 * 4)


@pytest.mark.parametrize("kind", ["files", "records"])
def test_an_image_of_too_many_pixels_is_not_seen(kind, files, tmp_path):
    Image.new("RGB", (30, 30)).save(files.paths[7])
    dataset = prepare_records(tmp_path / "tfds", files.paths[7]) if kind == "records" else files
    counters = [Unreadable(N, 0.1, max_pixels=16 * 20) for _ in range(2)]
    trained_on = labels_of(take(dataset, 30, unreadable=counters[0]))
    evaluated = batching.evaluation_batches(dataset, SIZE, 4, counters[1])
    evaluated = np.concatenate([labels for _, labels in evaluated])
    assert 7 not in trained_on and sorted({*range(N)} - {*evaluated}) == [7]
    assert [len(counter.names) for counter in counters] == [1, 1]
