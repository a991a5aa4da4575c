"""What files mean, form by form and route by route. A new form is a line of FORMS."""

import io
import os
import re
import struct
import sys
import types

import numpy as np
import pytest
import simplejpeg
import tensorflow as tf
from absl import logging
from image_files import (
    ALPHA,
    GREY,
    SCENE,
    bmp,
    chunk,
    convert,
    exif_of,
    gif_with_broken_second_frame,
    gif_with_small_frame,
    icns,
    packed_twelve_bits,
    png,
    save,
    tiff,
    turned,
    with_segments,
)
from PIL import Image, ImageFile, ImageOps

from isd_tf.data import graph_decoder, pixels

IN_GRAPH, ELSEWHERE = True, False
BROKEN_EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"
XMP_SEGMENT = b"http://ns.adobe.com/xap/1.0/\0"
XMP = b'<x:xmpmeta xmlns:tiff="t"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
MOVING = {"save_all": True, "append_images": [Image.new("RGB", (40, 30), "red")]}
JPEG = save(SCENE, "JPEG", quality=98, subsampling=0)
RGBA = np.dstack([SCENE, ALPHA])
SIXTEEN = (np.linspace(0, 65535, 1200).astype(np.uint16) // 3 * 3).reshape(30, 40, 1)
SIXTEEN_RGB = np.concatenate([SIXTEEN, SIXTEEN[::-1], SIXTEEN // 2], 2)
PALETTE = convert("RGB").quantize(16)
PALETTE_BYTES = np.arange(1024, dtype=np.uint32).astype(np.uint8).tobytes()
BLUE_GREEN_RED = SCENE[::-1, :, ::-1].tobytes()

# Name: (the file, whether `decode` must read it too; elsewhere it must fail or agree).
FORMS = {
    "jpeg": (JPEG, IN_GRAPH),
    "jpeg, chroma halved": (save(SCENE, "JPEG", quality=98), IN_GRAPH),
    "jpeg, progressive": (save(SCENE, "JPEG", quality=98, progressive=True), IN_GRAPH),
    "jpeg, grey": (save(convert("L"), "JPEG", quality=98), IN_GRAPH),
    "jpeg, stored as RGB": (save(SCENE, "JPEG", quality=98, keep_rgb=True), IN_GRAPH),
    "jpeg, CMYK": (save(convert("CMYK"), "JPEG", quality=98), ELSEWHERE),
    "jpeg, CMYK, not Adobe's": (
        re.sub(rb"\xff\xee\0\x0eAdobe.{7}", b"", save(convert("CMYK"), "JPEG"), flags=re.DOTALL),
        ELSEWHERE,
    ),
    "jpeg, exif of unknown order": (
        with_segments(JPEG, b"Exif\0\0" + exif_of(6).replace(b"II", b"IJ")),
        IN_GRAPH,
    ),
    "jpeg, filled before a marker": (JPEG[:2] + b"\xff\xff" + JPEG[2:], IN_GRAPH),
    "jpeg, rubbish behind": (JPEG + b"rubbish" * 100, IN_GRAPH),
    "jpeg, broken exif": (with_segments(JPEG, BROKEN_EXIF), IN_GRAPH),
    "jpeg, empty exif": (with_segments(JPEG, b"Exif\0\0"), IN_GRAPH),
    "jpeg, turned by xmp": (with_segments(JPEG, XMP_SEGMENT + XMP), IN_GRAPH),
    "jpeg, xmp and exif": (
        with_segments(JPEG, XMP_SEGMENT + XMP, b"Exif\0\0" + exif_of(3)),
        IN_GRAPH,
    ),
    "mpo": (
        turned("MPO", 6, quality=98, save_all=True, append_images=[Image.fromarray(SCENE[::-1])]),
        IN_GRAPH,
    ),
    "png": (save(SCENE, "PNG"), IN_GRAPH),
    "png, alpha": (save(RGBA, "PNG"), IN_GRAPH),
    "png, grey": (save(convert("L"), "PNG"), IN_GRAPH),
    "png, grey and alpha": (save(Image.fromarray(RGBA).convert("LA"), "PNG"), IN_GRAPH),
    "png, palette": (save(PALETTE, "PNG"), IN_GRAPH),
    "png, palette, one transparent": (save(PALETTE, "PNG", transparency=3), IN_GRAPH),
    "png, palette, some alpha": (
        save(PALETTE, "PNG", transparency=bytes(range(0, 160, 10))),
        IN_GRAPH,
    ),
    "png, transparent colour": (
        save(SCENE, "PNG", transparency=tuple(map(int, SCENE[0, 0]))),
        IN_GRAPH,
    ),
    "png, grey, transparent level": (
        save(convert("L"), "PNG", transparency=int(np.asarray(convert("L"))[0, 0])),
        IN_GRAPH,
    ),
    "png, 1 bit": (save(convert("1"), "PNG"), IN_GRAPH),
    "png, orientation at the end": (
        png(SCENE, 8, 2, after=[chunk(b"eXIf", exif_of(8))]),
        IN_GRAPH,
    ),
    "png, turned by xmp": (
        png(SCENE, 8, 2, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        IN_GRAPH,
    ),
    "png, exif as text": (
        png(
            SCENE, 8, 2,
            chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 38\n" + exif_of(6).hex().encode()),
        ),
        ELSEWHERE,
    ),
    "apng": (save(SCENE, "PNG", **MOVING), IN_GRAPH),
    "webp": (save(SCENE, "WEBP", lossless=True), IN_GRAPH),
    "webp, lossy": (save(SCENE, "WEBP", quality=95), IN_GRAPH),
    "webp, alpha": (save(RGBA, "WEBP", lossless=True, exact=True), IN_GRAPH),
    "webp, lossy, alpha": (save(RGBA, "WEBP", quality=95), IN_GRAPH),
    "webp, moving": (save(SCENE, "WEBP", lossless=True, **MOVING), ELSEWHERE),
    "webp, moving, alpha": (save(RGBA, "WEBP", lossless=True, **MOVING), IN_GRAPH),
    "gif": (save(SCENE, "GIF"), IN_GRAPH),
    "gif, grey": (save(convert("L"), "GIF"), IN_GRAPH),
    "gif, moving": (save(SCENE, "GIF", **MOVING), IN_GRAPH),
    "gif, interlaced": (save(PALETTE, "GIF", interlace=1), IN_GRAPH),
    "gif, comment": (save(PALETTE, "GIF", comment=b"x" * 300), IN_GRAPH),
    "gif, transparent": (save(PALETTE, "GIF", transparency=3), IN_GRAPH),
    "gif, transparent, moving": (save(RGBA, "GIF", **MOVING), IN_GRAPH),
    "gif, broken second frame": (gif_with_broken_second_frame(), IN_GRAPH),
    "gif, small frame": (gif_with_small_frame(), ELSEWHERE),
    "bmp": (save(SCENE, "BMP"), IN_GRAPH),
    "bmp, grey": (save(convert("L"), "BMP"), ELSEWHERE),
    "bmp, palette": (save(PALETTE, "BMP"), ELSEWHERE),
    "bmp, 1 bit": (save(convert("1"), "BMP"), ELSEWHERE),
    "bmp, 32 bits": (save(RGBA, "BMP"), IN_GRAPH),
    "bmp, top down": (bmp(24, SCENE[..., ::-1].tobytes(), height=-30), IN_GRAPH),
    "bmp, long head": (bmp(24, BLUE_GREEN_RED, head=124), IN_GRAPH),
    "bmp, 16 bits": (bmp(16, SIXTEEN.tobytes()), ELSEWHERE),
    "bmp, OS/2": (bmp(24, BLUE_GREEN_RED, head=12), ELSEWHERE),
    "bmp, run lengths": (
        bmp(8, b"\x28\x05\0\0" * 30 + b"\0\1", compression=1, palette=PALETTE_BYTES),
        ELSEWHERE,
    ),
    "tiff": (save(SCENE, "TIFF"), ELSEWHERE),
    "tiff, packed": (save(SCENE, "TIFF", compression="tiff_lzw"), ELSEWHERE),
    "tiff, CMYK": (save(convert("CMYK"), "TIFF"), ELSEWHERE),
    "tiff, alpha": (save(RGBA, "TIFF"), ELSEWHERE),
    "tiff, lab": (save(convert("LAB"), "TIFF"), ELSEWHERE),
    "tiff, YCbCr": (save(convert("YCbCr"), "TIFF"), ELSEWHERE),
    "tiff, 1 bit": (save(convert("1"), "TIFF"), ELSEWHERE),
    "tiff, tiled": (save(SCENE, "TIFF", tiled=True, tile=(16, 16)), ELSEWHERE),
    "tiff, fax": (save(convert("1"), "TIFF", compression="group4"), ELSEWHERE),
    "tiff, two pages": (save(SCENE, "TIFF", **MOVING), ELSEWHERE),
    "avif": (save(SCENE, "AVIF", quality=95), ELSEWHERE),
    "avif, alpha": (save(RGBA, "AVIF", quality=95), ELSEWHERE),
    "jpeg 2000": (save(SCENE, "JPEG2000"), ELSEWHERE),
    "ppm": (save(SCENE, "PPM"), ELSEWHERE),
    "ico": (save(RGBA, "ICO", sizes=[(40, 30)]), ELSEWHERE),
    "tga": (save(RGBA, "TGA"), ELSEWHERE),
    "qoi": (save(SCENE, "QOI"), ELSEWHERE),
    "pgm, text": (b"P2 # by hand\n3 2\n15\n0 7 15\n1 2 3\n", ELSEWHERE),
    "sgi": (save(SCENE, "SGI"), ELSEWHERE),
    "pcx": (save(SCENE, "PCX"), ELSEWHERE),
    "dds, alpha": (save(RGBA, "DDS"), ELSEWHERE),
}  # fmt: skip
for tag in range(1, 9):
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF"):
        FORMS[f"{form.lower()}, orientation {tag}"] = (
            turned(form, tag, quality=95) if form != "TIFF" else turned(form, tag),
            form in ("JPEG", "PNG", "WEBP"),
        )
    for order, kind in ((">", 3), (">", 4), ("<", 4)):
        FORMS[f"jpeg, orientation {tag}, {order}{kind}"] = (
            with_segments(JPEG, b"Exif\0\0" + exif_of(tag, order, kind)),
            IN_GRAPH,
        )

# Of these Pillow says nothing that could be compared with: (the file, pixels, in the graph).
SIXTEEN_BITS = {
    "png": (png(SIXTEEN, 16, 0), SIXTEEN / 257, IN_GRAPH),
    "png, interlaced": (png(SIXTEEN, 16, 0, interlaced=True), SIXTEEN / 257, IN_GRAPH),
    "png, transparent level": (
        png(SIXTEEN, 16, 0, chunk(b"tRNS", SIXTEEN[3, 3].astype(">u2").tobytes())),
        np.where(SIXTEEN == SIXTEEN[3, 3], 255, SIXTEEN / 257),
        IN_GRAPH,
    ),
    "png, alpha": (
        png(np.dstack([SIXTEEN, np.full_like(SIXTEEN, 65535)]), 16, 4), SIXTEEN / 257, IN_GRAPH,
    ),
    "png, RGB": (png(SIXTEEN_RGB, 16, 2), SIXTEEN_RGB / 257, IN_GRAPH),
    "png, RGB, transparent colour": (
        png(SIXTEEN_RGB, 16, 2, chunk(b"tRNS", SIXTEEN_RGB[3, 3].astype(">u2").tobytes())),
        np.where((SIXTEEN_RGB == SIXTEEN_RGB[3, 3]).all(2, keepdims=True), 255, SIXTEEN_RGB / 257),
        IN_GRAPH,
    ),
    "png, RGB and alpha": (
        png(np.dstack([SIXTEEN_RGB, SIXTEEN * 0]), 16, 6), SIXTEEN * 0 + 255, IN_GRAPH,
    ),
    "tiff": (save(SIXTEEN[..., 0], "TIFF"), SIXTEEN / 257, ELSEWHERE),
    "tiff, packed": (
        save(SIXTEEN[..., 0], "TIFF", compression="tiff_lzw"), SIXTEEN / 257, ELSEWHERE,
    ),
    "tiff, other byte order": (
        save(Image.frombytes("I;16B", (40, 30), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
        SIXTEEN / 257,
        ELSEWHERE,
    ),
    "tiff, 32 bits": (save(SIXTEEN[..., 0].astype(np.int32), "TIFF"), SIXTEEN / 257, ELSEWHERE),
    "tiff, 12 bits": (
        tiff(packed_twelve_bits(SIXTEEN // 16), 12, 1, 1), SIXTEEN / 257, ELSEWHERE,
    ),
    "tiff, grey multiplied by its alpha": (
        tiff(np.dstack([GREY // 2, GREY * 0 + 128]).tobytes(), 8, 2, 1, (338, 1)),
        GREY // 2 + 127.0,
        ELSEWHERE,
    ),
    "pgm": (save(SIXTEEN[..., 0], "PPM"), SIXTEEN / 257, ELSEWHERE),
    "ppm": (b"P6 40 30 65535 " + SIXTEEN_RGB.astype(">u2").tobytes(), SIXTEEN_RGB / 257, ELSEWHERE),
    "jpeg 2000": (save(SIXTEEN[..., 0], "JPEG2000"), SIXTEEN / 257, ELSEWHERE),
    # Few bits, of which Pillow leaves the transparent level at the file's depth.
    "png, 2 bits": (
        png(GREY // 64, 2, 0, chunk(b"tRNS", b"\0\2")),
        np.where(GREY // 64 == 2, 255, GREY // 64 * 85),
        IN_GRAPH,
    ),
    "png, 4 bits": (
        png(GREY // 16, 4, 0, chunk(b"tRNS", b"\0\5")),
        np.where(GREY // 16 == 5, 255, GREY // 16 * 17),
        IN_GRAPH,
    ),
    "png, 1 bit": (png(GREY // 128, 1, 0, chunk(b"tRNS", b"\0\0")), GREY * 0 + 255, IN_GRAPH),
}  # fmt: skip

decode = tf.function(graph_decoder.decode, input_signature=[tf.TensorSpec([], tf.string)])


def seen(encoded):
    """As a viewer on a white page shows the first frame, by other ways through Pillow."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB")).astype(int)
    values = np.asarray(image.convert("RGBA")).astype(float)
    alpha = values[..., 3:] / 255
    return np.rint(values[..., :3] * alpha + 255 * (1 - alpha)).astype(int)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_has_the_pixels_that_people_see(form):
    encoded, in_graph = FORMS[form]
    image = pixels.open_image(encoded)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), seen(encoded))
    np.testing.assert_array_equal(pixels.decode(encoded), seen(encoded))
    agrees_in_graph(encoded, seen(encoded), in_graph)


@pytest.mark.parametrize("form", SIXTEEN_BITS)
def test_other_depths_take_the_whole_range(form):
    encoded, expected, in_graph = SIXTEEN_BITS[form]
    expected = np.broadcast_to(expected, (30, 40, 3))
    assert np.abs(pixels.decode(encoded) - expected).max() <= 1
    np.testing.assert_array_equal(np.asarray(pixels.open_image(encoded)), pixels.decode(encoded))
    agrees_in_graph(encoded, expected, in_graph)


def agrees_in_graph(encoded, expected, in_graph):
    try:
        image = decode(encoded).numpy()
    except tf.errors.OpError:
        assert not in_graph
        return
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image - expected).mean() <= 0.5


def test_an_icon_with_a_palette_has_its_colours():
    image = convert("RGB").resize((128, 128)).quantize(16)
    np.testing.assert_array_equal(
        np.asarray(pixels.open_image(icns(image))), np.asarray(image.convert("RGB"))
    )


def test_four_of_one_scene_differ_where_only_what_is_hidden_does():
    """Noise below alpha 0 leaves no trace, in any format; half transparency is laid on white."""
    other = RGBA.copy()
    other[:10, :, :3] = 255 - other[:10, :, :3]
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        images = [np.asarray(pixels.open_image(save(x, form, **options))) for x in (RGBA, other)]
        np.testing.assert_array_equal(*images)
        assert (images[0][:10] == 255).all()
        np.testing.assert_array_equal(images[0][20:], SCENE[20:])
        # At alpha 120 of 255.
        expected = np.rint(SCENE[15, 20] * (120 / 255) + 255 * (135 / 255))
        np.testing.assert_array_equal(images[0][15, 20], expected)


def test_an_ordinary_jpeg_is_decoded_and_nothing_else(monkeypatch):
    """No copy and no search for orientation: the picture is what Pillow has loaded."""
    for method in ("convert", "copy", "transpose", "getexif"):
        monkeypatch.setattr(Image.Image, method, None)
    assert isinstance(pixels.open_image(JPEG), Image.Image)


NOISE = np.random.RandomState(1).randint(0, 256, (61, 83, 3), np.uint8)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}], ids=str
)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "grey", "RGB"])
@pytest.mark.parametrize("quality", [5, 75, 100])
def test_jpegs_are_decoded_without_pillow_to_its_pixels(options, subsampling, quality, monkeypatch):
    if subsampling in ("grey", "RGB"):
        image = Image.fromarray(NOISE).convert("L" if subsampling == "grey" else "RGB")
        options = options | {"keep_rgb": subsampling == "RGB"}
    else:
        image, options = Image.fromarray(NOISE), options | {"subsampling": subsampling}
    encoded = save(image, "JPEG", quality=quality, **options)
    expected = seen(encoded)
    monkeypatch.setattr(Image.Image, "load", None)
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    np.testing.assert_array_equal(pixels.decode(encoded), expected)


def test_a_damaged_jpeg_means_the_same_with_and_without_pillow(monkeypatch):
    """The same pixels, or the same reason why there are none."""
    decode, decoded = simplejpeg.decode_jpeg, []
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda encoded: decoded.append(decode(encoded)) or decoded[-1]
    )
    random = np.random.RandomState(2)
    whole = [turned("JPEG", 6, NOISE, progressive=progressive) for progressive in (False, True)]
    whole.append(turned("JPEG", 6, NOISE, quality=98, restart_marker_blocks=2))
    reasons = []
    for number in range(300):
        jpeg = whole[number % 3]
        begin, length = random.randint(2, len(jpeg)), random.randint(20)
        other = random.bytes(random.randint(20))
        encoded = jpeg[:begin] + other + jpeg[begin + length :] * (number % 4 > 0)
        try:
            expected = np.asarray(pixels.open_image(encoded))
        except pixels.UnreadableImage as error:
            reasons.append(str(error))
            with pytest.raises(pixels.UnreadableImage) as without:
                pixels.decode(encoded)
            assert str(without.value) == reasons[-1]
        else:
            np.testing.assert_array_equal(pixels.decode(encoded), expected)
    assert len(reasons) > 50 and len(decoded) > 10 and len(reasons) + len(decoded) < 250


def test_a_jpeg_without_its_end_mark_is_whole():
    for quality, progressive in ((98, False), (60, True)):
        jpeg = save(SCENE, "JPEG", quality=quality, progressive=progressive)
        for whole in (np.asarray(pixels.open_image(jpeg[:-2])), pixels.decode(jpeg[:-2])):
            np.testing.assert_array_equal(whole, np.asarray(pixels.open_image(jpeg)))
        for cut in (1, 2, 3, 60, 300):
            if jpeg[-2 - cut : -cut] != b"\xff\xd9":
                fails(jpeg[: -2 - cut], "cut off")


def fails(encoded, message, **arguments):
    for read in (pixels.open_image, pixels.decode):
        with pytest.raises(pixels.UnreadableImage) as error:
            read(encoded, **arguments)
        assert str(error.value).startswith(message)
        assert not {"0x", "BytesIO", "/"} & set(str(error.value).replace("_", " ").split())


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>", "not an image: begins with '<!DOCTYPE html><html'..."),
        (b"no", "not an image: begins with 'no'"),
        *((begin, "cut off") for begin in (pixels.JPEG_BEGIN, pixels.PNG_BEGIN, b"GIF8", b"BM")),
        (b"RIFF\0\0\0\0WEBP", "cut off"),
        (bytes(100), "not an image: begins with the bytes 00 00 00"),
        (JPEG[:60], "cut off"),
        (JPEG[: len(JPEG) // 2], "cut off"),
        (FORMS["png"][0][:20], "cut off"),
        (FORMS["png"][0][:-40], "cut off"),
        (FORMS["gif"][0][:200], "cut off"),
        (FORMS["bmp"][0][:200], "cut off"),
        (FORMS["webp"][0][:100], "cut off"),
        (save(SCENE.astype(np.float32)[..., 0], "TIFF"), "floating-point values of unknown range"),
        (save(SIXTEEN[..., 0].astype(np.int32) - 9, "TIFF"), "values from -9 to 65526;"),
        (
            tiff(np.moveaxis(SIXTEEN_RGB, 2, 0).tobytes(), 16, 3, 2, (284, 2)),
            "a TIFF of 16 bits, plane by plane",
        ),
        (
            tiff(np.dstack([SIXTEEN, SIXTEEN]).tobytes(), 16, 2, 1, (338, 2)),
            "a TIFF of a form that Pillow does not read",
        ),
        (tiff(bytes(2400), 16, 1, 1)[:2300], "cut off"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a EPS file, not"),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300),
            "a HEIC file; pip install pillow-heif",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_reason_why_a_file_cannot_be_read_is_plain(encoded, reason):
    fails(encoded, reason)
    with pytest.raises(tf.errors.OpError):
        decode(encoded)


def test_damage_is_told_apart_from_a_cut():
    damaged = bytearray(FORMS["png"][0])
    damaged[len(damaged) // 2] ^= 255
    fails(bytes(damaged), "damaged: ")


def test_heic_is_read_where_its_package_is_installed(monkeypatch):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)
    package = types.ModuleType("pillow_heif")

    def register_heif_opener():
        Image.register_open("HEIF", lambda *_: Image.new("RGB", (3, 2)), pixels._is_heif)
        Image.register_extension("HEIF", ".heic")

    package.register_heif_opener = register_heif_opener
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    for name, copy in (("OPEN", dict), ("ID", list), ("EXTENSION", dict)):
        monkeypatch.setattr(Image, name, copy(getattr(Image, name)))
    caches = (pixels._register_heif, pixels.image_suffixes)
    for function in caches:
        function.cache_clear()
    try:
        assert pixels.open_image(heic).size == (3, 2)
        assert ".heic" in pixels.image_suffixes()
    finally:
        for function in caches:
            function.cache_clear()


def test_a_large_image_is_handed_over_in_parts(monkeypatch):
    encoded = save(RGBA, "PNG")
    height, width = RGBA.shape[:2]
    parts = []
    crop = Image.Image.crop
    monkeypatch.setattr(
        Image.Image, "crop", lambda image, box: parts.append(box) or crop(image, box)
    )
    for rows, count in ((1, height), (7, -(-height // 7)), (height, 0)):
        parts.clear()
        monkeypatch.setattr(pixels, "PART_PIXELS", rows * width)
        np.testing.assert_array_equal(
            pixels.decode(encoded), np.asarray(pixels.open_image(encoded))
        )
        assert len(parts) == count


def test_one_limit_of_pixels_holds_for_every_format_and_route():
    small = tf.function(
        lambda encoded: graph_decoder.decode(encoded, max_pixels=1199),
        input_signature=decode.input_signature,
    )
    for form in ("jpeg", "png", "webp", "webp, alpha", "gif", "bmp", "tiff", "avif"):
        encoded, in_graph = FORMS[form]
        fails(encoded, "40 x 30 pixels, more than --max_pixels=1199", max_pixels=1199)
        assert pixels.open_image(encoded, max_pixels=1200).size == (40, 30)
        if in_graph:
            with pytest.raises(tf.errors.InvalidArgumentError, match="--max_pixels=1199.*40.*30"):
                small(encoded)


def test_what_a_graph_would_turn_or_lay_on_white_is_limited_and_the_cure_is_said(monkeypatch):
    monkeypatch.setattr(graph_decoder, "LARGE_PIXELS", 1199)
    graph = tf.function(
        lambda encoded: graph_decoder._decode_png(encoded, pixels.MAX_PIXELS),
        input_signature=decode.input_signature,
        autograph=False,
    )
    assert graph(FORMS["png"][0]).shape == (30, 40, 3)
    for form in ("png, alpha", "png, orientation 6"):
        with pytest.raises(tf.errors.InvalidArgumentError, match="at most 1199.*smaller.*1200"):
            graph(FORMS[form][0])
        assert pixels.open_image(FORMS[form][0]).size in ((40, 30), (30, 40))


def test_a_png_of_many_pixels_in_few_bytes_is_refused_before_it_is_decoded():
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    fails(bomb, "20000 x 20000 pixels, more than --max_pixels=178956970")
    with pytest.raises(tf.errors.InvalidArgumentError, match="--max_pixels=178956970.*20000"):
        decode(bomb)


def test_twelve_bits_in_sixteen_are_named_once(caplog):
    logging._log_counter_per_token.clear()
    pixels.open_image(png(SIXTEEN, 16, 0), "a.png")
    pixels.open_image(png(SIXTEEN * 0, 16, 0), "black.png")
    assert "16 bits" not in caplog.text
    for values, colour in ((SIXTEEN // 16, 0), (SIXTEEN_RGB // 16, 2), (SIXTEEN // 16, 0)):
        logging._log_counter_per_token.clear()
        caplog.clear()
        for name in ("b.png", "c.png"):
            pixels.open_image(png(values, 16, colour), name)
        assert caplog.text.count("16 bits") == 1 and "b.png has" in caplog.text


def test_files_that_cannot_be_opened_say_why(tmp_path):
    def fails(path, reason):
        with pytest.raises(pixels.UnreadableImage, match=f"^{reason}$"):
            pixels.read_file(path)

    (tmp_path / "a.jpg").write_bytes(JPEG)
    assert pixels.read_file(str(tmp_path / "a.jpg")) == JPEG
    assert pixels.read_file(os.fsencode(tmp_path / "a.jpg")) == JPEG
    fails(str(tmp_path / "gone.jpg"), "no such file")
    (tmp_path / "link.jpg").symlink_to("/nowhere/x.jpg")
    fails(str(tmp_path / "link.jpg"), "no such file")
    fails(str(tmp_path), "a folder")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    fails(str(tmp_path / "loop.jpg"), "too many levels of symbolic links")
    (tmp_path / "closed.jpg").write_bytes(JPEG)
    (tmp_path / "closed.jpg").chmod(0)
    if os.geteuid():  # Root may read all.
        fails(str(tmp_path / "closed.jpg"), "permission denied")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert pixels.read_file(str(tmp_path / "pipe.jpg")) == b""
