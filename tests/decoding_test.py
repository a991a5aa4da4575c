import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from isd_tf.data import crop_processes, decoding

# Large flat areas, so that the roundings of JPEG decoders stay small.
SCENE = np.asarray(
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (3, 4, 3), np.uint8)).resize((40, 30))
)


def encoded(format_name, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(SCENE).convert(mode).save(buffer, format_name, **options)
    return buffer.getvalue()


def sixteen_bit_png():
    buffer = io.BytesIO()
    gray = np.asarray(Image.fromarray(SCENE).convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(buffer, "PNG")
    return buffer.getvalue()


FORMS = {
    "jpeg": encoded("JPEG", quality=98, subsampling=0),
    "grey jpeg": encoded("JPEG", "L", quality=98),
    "cmyk jpeg": encoded("JPEG", "CMYK", quality=98),
    "png": encoded("PNG"),
    "png with alpha": encoded("PNG", "RGBA"),
    "grey png with alpha": encoded("PNG", "LA"),
    "palette png": encoded("PNG", "P"),
    "1-bit png": encoded("PNG", "1"),
    "16-bit png": sixteen_bit_png(),
    "webp": encoded("WEBP", lossless=True),
    "webp with alpha": encoded("WEBP", "RGBA", lossless=True),
    "moving webp": encoded("WEBP", save_all=True, lossless=True,
                           append_images=[Image.new("RGB", (40, 30))]),
    "bmp": encoded("BMP"),
    "grey bmp": encoded("BMP", "L"),
    "1-bit bmp": encoded("BMP", "1"),
    "gif": encoded("GIF"),
    "moving gif": encoded("GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """What these tests look at images by is in no process's program."""
    monkeypatch.setattr(crop_processes, "look_at_in_process", crop_processes.look_at)


def see(images, unreadable=None, are_paths=False, attempts=None):
    """Sees the first readable of each image's candidates, [n][attempts], inside tf.data.

    Of image i, candidate j is called "image i.j" and labelled 10 i + j, or named as its path is.
    """
    sources = tf.constant(images)
    unreadable = unreadable or decoding.Unreadable(sources.shape[1], 1.0)
    numbers = tf.range(len(images), dtype=tf.int64)

    def load(_):
        def candidates(which, attempt):
            named = tf.strings.join(
                ["image ", tf.strings.as_string(which), ".", tf.strings.as_string(attempt)]
            )
            own = tf.gather(sources, which)[:, attempt]
            return own, own if are_paths else named, 10 * which + attempt

        return decoding.look_at_first_readable(
            candidates,
            are_paths,
            lambda image, draws: [image, draws],
            (tf.zeros([0, *SCENE.shape], tf.uint8), tf.zeros([0], tf.float32)),
            attempts or sources.shape[1],
            unreadable,
            numbers + 5,
            tf.cast(numbers, tf.float32),
        )

    return tf.nest.map_structure(
        lambda x: x.numpy(), tf.data.Dataset.range(1).map(load).get_single_element()
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_form_decodes_as_pillow_does(form):
    unreadable = decoding.Unreadable(1, 0.0)
    (images, _), _, readable, _ = see([[FORMS[form]]], unreadable)
    if form == "16-bit png":
        expected = np.asarray(Image.fromarray(SCENE).convert("L").convert("RGB"))
    else:
        expected = np.asarray(Image.open(io.BytesIO(FORMS[form])).convert("RGB"))
    assert images[0].shape == expected.shape and images.dtype == np.uint8
    assert np.abs(images[0].astype(int) - expected).mean() <= 0.5
    assert readable[0] and not unreadable.names


BROKEN = (b"", b"not an image", FORMS["jpeg"][:60], FORMS["png"][:-40])
OTHER = 255 - SCENE
OTHER_PNG = io.BytesIO()
Image.fromarray(OTHER).save(OTHER_PNG, "PNG")
OTHER_PNG = OTHER_PNG.getvalue()


@pytest.mark.parametrize("broken", BROKEN)
def test_an_unreadable_image_gives_way_to_the_next_and_is_named(broken):
    unreadable = decoding.Unreadable(2, 0.5)
    (images, _), labels, readable, at_once = see([[broken, FORMS["png"]]], unreadable)
    np.testing.assert_array_equal(images, [SCENE])
    assert labels == [1] and readable == [True] and not at_once
    assert unreadable.names == {"image 0.0"}


def test_each_image_of_a_group_goes_on_to_its_own_first_readable_candidate():
    png = FORMS["png"]
    images = [[png, b"", b"x"], [b"", b"x", OTHER_PNG], [b"x", png, OTHER_PNG], [b"", b"x", b"y"]]
    unreadable = decoding.Unreadable(12, 0.9)
    (seen, draws), labels, readable, at_once = see(images, unreadable)
    np.testing.assert_array_equal(seen, [SCENE, OTHER, SCENE, 0 * SCENE])
    assert labels.tolist()[:3] == [0, 12, 21]
    assert draws.tolist() == [0, 1, 2, 0] and readable.tolist() == [True, True, True, False]
    # What was not needed was not read.
    of_last_two = {"image 2.0", "image 3.0", "image 3.1", "image 3.2"}
    assert unreadable.names == {"image 1.0", "image 1.1", *of_last_two} and not at_once
    assert see([[png, b""], [OTHER_PNG, b""]])[-1]


@pytest.mark.parametrize(
    ("candidates", "attempts", "label"),
    [([b"", b"x", FORMS["png"], b""], 4, 2), ([b"", b"x", FORMS["png"]], 2, None)],
)
def test_a_graph_gets_the_first_readable_image_or_an_empty_one(candidates, attempts, label):
    unreadable, sources = decoding.Unreadable(9, 1.0), tf.constant(candidates)

    def load(_):
        return decoding.decode_first_readable(
            lambda attempt: (sources[attempt], tf.strings.as_string(attempt), attempt),
            bytes,
            attempts,
            unreadable,
            tf.constant(5, tf.int64),
        )

    image, found = tf.data.Dataset.range(1).map(load).get_single_element()
    if label is None:
        assert image.shape == (0, 0, 3)
    else:
        np.testing.assert_array_equal(image, SCENE)
        assert found == label
    assert unreadable.names == {"0", "1"} and not unreadable.met_before(5)


def test_a_missing_file_is_named_with_its_reason(tmp_path, caplog):
    unreadable = decoding.Unreadable(2, 0.5)
    present = tmp_path / "here.png"
    present.write_bytes(FORMS["png"])
    paths = [str(tmp_path / "gone.png"), str(present)]
    (images, _), *_ = see([paths], unreadable, are_paths=True)
    np.testing.assert_array_equal(images, [SCENE])
    assert f"left out: {tmp_path / 'gone.png'} (no such file)" in caplog.text


@pytest.mark.parametrize("form", ["png", "cmyk jpeg"])
def test_an_image_of_too_many_pixels_is_unreadable(form, caplog):
    for limit, expected in ((40 * 30, 0), (40 * 30 - 1, 1)):
        unreadable = decoding.Unreadable(2, 0.5, decoding.REPLACED, max_pixels=limit)
        see([[FORMS[form]]], unreadable)
        assert len(unreadable.names) == expected
    expected = "replaced by the next one: image 0.0 (40 x 30 pixels, more than --max_pixels=1199)"
    assert expected in caplog.text


def test_no_more_images_are_tried_for_a_place_than_may_be_unreadable_and_one():
    """Whatever else was read before: the same are counted, and named, by any number of readers."""
    for before in (0, 9):
        opened = decoding.Unreadable(8, 0.25)
        for number in range(before):
            opened.add(f"before {number}", "broken", 0)
        *_, readable, _ = see([[b"", b"x", b"y", b"z", b"q", FORMS["png"]]], opened)
        assert readable == [False]
        assert {name for name in opened.names if "image" in name} == {
            *("image 0.0", "image 0.1", "image 0.2"),
        }


def test_an_image_counts_from_its_first_place_on_whatever_was_read_ahead():
    unreadable = decoding.Unreadable(100, 0.02)
    for name, place in (("far.jpg", 90), ("b.jpg", 20), ("a\n.jpg", 7), ("b.jpg", 60)):
        unreadable.add(name, "broken", place)
    for place, count in ((7, 0), (8, 1), (20, 1), (21, 2), (90, 2)):
        assert len(unreadable.met_before(place)) == count
        unreadable.check(place)
    message = r"At most 2.0%.*3 of 100, for example a\\n.jpg, b.jpg, far.jpg.*max_unreadable"
    with pytest.raises(ValueError, match=message):
        unreadable.check(91)
    with pytest.raises(ValueError, match=message), decoding.explaining([unreadable]):
        raise tf.errors.UnknownError(None, None, "what the pipeline makes of it")


def test_that_all_are_unreadable_is_beyond_any_limit():
    unreadable = decoding.Unreadable(2, 1.0)
    unreadable.add("a", "", 0)
    unreadable.check(2)
    unreadable.add("b", "", 1)
    with pytest.raises(ValueError, match="2 of 2"):
        unreadable.check(2)


def test_of_a_part_the_limit_is_a_share_of_the_whole():
    part = decoding.Unreadable(42, 0.01, whole=201)
    assert not part.refusal(2, ["a", "b"])
    assert "Received: 3 of 42, a part of 201, for example a" in part.refusal(3, ["a"])
    assert decoding.Unreadable(2, 0.5, whole=9).refusal(2, ["a"])  # None is left.


def test_what_a_data_service_cannot_read_is_looked_at_here(tmp_path):
    def said(path):
        message = f"assertion failed: [{decoding.UNREADABLE_IN_SERVICE}] [{path}]"
        with pytest.raises(ValueError) as raised, decoding.explaining([]):
            raise tf.errors.InvalidArgumentError(None, None, message)
        return str(raised.value)

    (tmp_path / "a.jpg").write_bytes(b"")
    assert f"Received: {tmp_path}/a.jpg (empty). Repair or remove it, or" in said(
        tmp_path / "a.jpg"
    )
    Image.new("CMYK", (30, 20)).save(tmp_path / "b.jpg")
    text = said(tmp_path / "b.jpg")
    assert "b.jpg (30 x 20 pixels, which Pillow reads and a graph does not). Save it in" in text
    assert text.endswith("or train without --data_service, which reads it.")
    assert "Received: x/shard, record 2. Repair or remove it" in said("x/shard, record 2")


def test_an_image_is_counted_once():
    unreadable = decoding.Unreadable(10, 0.1)
    unreadable.add("a.jpg", "broken", 0)
    unreadable.add("a.jpg", "broken", 1)
    assert unreadable.names == {"a.jpg"} and unreadable.readable == 9
