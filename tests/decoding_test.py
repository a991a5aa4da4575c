import io
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from isd_tf.data import decoding
from isd_tf.data.pixels import MAX_PIXELS, read_file

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


def decoded(source, unreadable=None, max_pixels=MAX_PIXELS):
    image, failure = decoding.decode_or_say(bytes, max_pixels, source, b"an image")
    if unreadable:
        unreadable.count(np.int64([5]), np.array([failure], object))
    return image


@pytest.mark.parametrize("form", FORMS)
def test_every_form_decodes_as_pillow_does(form):
    unreadable = decoding.Unreadable(1, 0.0)
    image = decoded(FORMS[form], unreadable)
    if form == "16-bit png":
        expected = np.asarray(Image.fromarray(SCENE).convert("L").convert("RGB"))
    else:
        expected = np.asarray(Image.open(io.BytesIO(FORMS[form])).convert("RGB"))
    assert image.shape == expected.shape and image.dtype == np.uint8
    assert np.abs(image.astype(int) - expected).mean() <= 0.5
    assert not unreadable.names


@pytest.mark.parametrize("broken", [b"", b"not an image", FORMS["jpeg"][:60], FORMS["png"][:-40]])
def test_a_broken_image_is_empty_and_counted(broken):
    unreadable = decoding.Unreadable(2, 0.5)
    assert decoded(broken, unreadable).shape == (0, 0, 3)
    assert unreadable.met_before(6) == ["an image"] and not unreadable.met_before(5)


@pytest.mark.parametrize("form", ["png", "cmyk jpeg"])
def test_an_image_of_too_many_pixels_is_unreadable(form, caplog):
    unreadable = decoding.Unreadable(2, 0.5, decoding.REPLACED)
    assert decoded(FORMS[form], unreadable, 40 * 30).size and not unreadable.names
    assert not decoded(FORMS[form], unreadable, 40 * 30 - 1).size
    expected = "replaced by the next one: an image (40 x 30 pixels, more than --max_pixels=1199)"
    assert expected in caplog.text


def test_names_and_reasons_need_not_be_utf8(caplog):
    path = b"no/such\n\xe9.png"
    _, failure = decoding.decode_or_say(read_file, MAX_PIXELS, path, path)
    unreadable = decoding.Unreadable(2, 0.5)
    unreadable.count(np.int64([0]), np.array([failure], object))
    assert unreadable.names == {os.fsdecode(path)}
    assert "left out: no/such\\n\\udce9.png (no such file)" in caplog.text
    odd = decoding._failure("c", "odd \udce9 \ud800 \0")
    unreadable.count(np.int64([1]), np.array([odd], object))
    assert unreadable.met_before(2)[1:] == ["c"]


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


def test_an_image_is_counted_once():
    unreadable = decoding.Unreadable(10, 0.1)
    unreadable.add("a.jpg", "broken", 0)
    unreadable.add("a.jpg", "broken", 1)
    assert unreadable.names == {"a.jpg"} and unreadable.readable == 9
