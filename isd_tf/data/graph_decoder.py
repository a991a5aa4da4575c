"""Encoded images to pixels inside a TensorFlow graph, where there is no Python.

For serving, and for evaluations, whose features shall be those of a served model. What every format
means is said in `pixels`; here the same comes of it, or an error.

Conditions and loops run functions, and here each waits for the one before it: let a new one depend
on it. If two run at once and one fails, TensorFlow cancels the other, which may be the first to
report, CANCELLED. `Dataset.ignore_errors` does not ignore that: an image would end an evaluation.
"""

import functools
import os
import re
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from PIL import ExifTags

from isd_tf.data.pixels import BEGINNING, JPEG_BEGIN, MAX_PIXELS, PNG_BEGIN, WHITE
from isd_tf.views.crops import in_parts, with_sides_swapped

# What `decode` reads: how the names of such files end, and how they begin.
GRAPH_FORMATS = {
    "JPEG": ({".jpg", ".jpeg", ".jpe", ".jfif"}, JPEG_BEGIN),
    "PNG": ({".png"}, PNG_BEGIN),
    "WebP": ({".webp"}, b"RIFF....WEBP"),
    "GIF": ({".gif"}, b"GIF8"),
    "BMP": ({".bmp"}, b"BM"),
}
# Of so many files a dataset's formats are seen as well, as names may not tell.
LOOKED_INTO = 64
# What has more pixels is turned and laid on white in Python, in less memory.
LARGE_PIXELS = 2**26
NOWHERE = np.int64([0, 0])  # A place and a length.
XMP_BEGIN = b"http://ns.adobe.com/xap/1.0/\0"  # In a JPEG.


@tf.autograph.experimental.do_not_convert  # There is nothing to convert, and it takes seconds.
def decode(
    encoded: tf.Tensor,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = tuple(GRAPH_FORMATS),
) -> tf.Tensor:
    """Decodes JPEG, PNG, WebP, GIF or BMP in a graph, to the pixels that `open_image` gives.

    It fails, by an error of TensorFlow, for what is broken or too large, for other formats, and
    for forms that TensorFlow would read otherwise: CMYK, palettes in BMP, a first frame of a GIF
    that is smaller than the picture, orientation that is stored in compressed text.

    Args:
        encoded: a string scalar.
        max_pixels: width times height that is still decoded.
        formats: those that are expected: it fails for others too.

    Returns:
        uint8 [H, W, 3].
    """
    if tf.executing_eagerly():
        return _traced(_decode, max_pixels, formats)(encoded)
    return _decode(encoded, max_pixels, formats)


def graph_formats(paths: Sequence[str]) -> tuple[str, ...]:
    """Which of `decode`'s formats files have by their names, or by the beginnings of some."""
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    beginnings = list(map(_beginning, paths[:: len(paths) // LOOKED_INTO + 1]))
    return tuple(
        name
        for name, (own, begin) in GRAPH_FORMATS.items()
        if suffixes & own or any(re.match(begin, found, re.DOTALL) for found in beginnings)
    )


def _beginning(path):
    try:
        with open(path, "rb") as file:
            return file.read(BEGINNING)
    except OSError:
        return b""


@functools.cache
def _traced(function, *settings):
    """A function of a string scalar, traced once: there is much of it, and many pipelines."""

    def of_encoded(encoded):
        return function(encoded, *settings)

    signature = [tf.TensorSpec([], tf.string)]
    return tf.function(of_encoded, signature, autograph=False).get_concrete_function()


def _decode(encoded, max_pixels, formats, number=0):
    """Decodes by the first kind that fits, from one of the formats' kinds on."""
    kinds = [kind for name in formats for kind in KINDS[name]]
    if number == len(kinds):
        with _require(False, f"Expected one of {', '.join(formats)}."):
            return tf.zeros([0, 0, 3], tf.uint8)
    is_kind, decode_kind = kinds[number]
    # `tf.cond` would become a part of the graph, of which TensorFlow passes through all that an
    # image does not need: of five formats a third of a millisecond, and half a second at every
    # start. An `If` runs a function, which is prepared when it is first needed.
    with tf.device("CPU:0"):  # Other devices have no decoders.
        (image,) = tf.raw_ops.If(
            cond=is_kind(encoded),
            input=[encoded],
            Tout=[tf.uint8],
            then_branch=_traced(decode_kind, max_pixels),
            else_branch=_traced(_decode, max_pixels, formats, number + 1),
        )
    return tf.ensure_shape(image, [None, None, 3])


def _starts(encoded, prefix, at=0):
    return _cut(encoded, at, len(prefix)) == prefix


def _upright(image, orientation):
    return tf.cond(
        (orientation >= 2) & (orientation <= 8),
        lambda: _turned(image, orientation),
        lambda: image,
    )


def _turned(image, orientation):
    def is_one_of(*orientations):
        return tf.reduce_any(orientation == orientations)

    with _require_small(image):
        image = tf.cond(is_one_of(2, 3, 7, 8), lambda: tf.reverse(image, [1]), lambda: image)
    image = tf.cond(is_one_of(3, 4, 6, 7), lambda: tf.reverse(image, [0]), lambda: image)
    return tf.cond(orientation >= 5, lambda: _transposed(image), lambda: image)


def _transposed(image):
    def transpose(begin, end):
        part = tf.cast(image[tf.newaxis, :, begin:end], tf.float32)
        return tf.cast(with_sides_swapped(part)[0], tf.uint8)

    height, width = tf.unstack(tf.shape(image)[:2])
    return in_parts(transpose, width, height, tf.zeros([0, height, 3], tf.uint8), joined=0)


def _cut(encoded, at, length):
    """`length` bytes from a place on, fewer where the string ends before."""
    # Beyond the end TensorFlow's error would quote the whole file.
    at = tf.minimum(tf.cast(at, tf.int64), tf.cast(tf.strings.length(encoded), tf.int64))
    return tf.strings.substr(encoded, at, tf.cast(length, tf.int64))


def _number(encoded, at, size, big_endian=False):
    """The unsigned number of `size` bytes, int64, that stands at a place."""
    values = tf.cast(tf.io.decode_raw(_cut(encoded, at, size), tf.uint8), tf.int64)
    weights = 256 ** np.arange(size, dtype=np.int64)
    # A file that ends too early has fewer bytes: an error.
    values = tf.ensure_shape(values, [size])
    return tf.reduce_sum(values * (weights[::-1] if big_endian else weights))


def _require(condition, message, *values):
    # `tf.debugging.Assert` runs a function, unless all values are strings or int32.
    check = tf.raw_ops.Assert(condition=condition, data=[message, *values])
    return tf.control_dependencies([check])


def _require_size(width, height, max_pixels):
    return _require(
        tf.cast(width, tf.int64) * tf.cast(height, tf.int64) <= max_pixels,
        f"More pixels than --max_pixels={max_pixels}:",
        width,
        height,
    )


def _require_small(image):
    pixels = tf.reduce_prod(tf.shape(image)[:2])
    return _require(
        pixels <= LARGE_PIXELS,
        f"Expected at most {LARGE_PIXELS} pixels of what is to be turned upright or laid on white, "
        "which takes a graph too much memory. Make it smaller, or store it upright and opaque. "
        "Received pixels:",
        pixels,
    )


def _is_plain_jpeg(encoded):
    # Most have nothing in their head that could turn them. To see that takes a tenth of the time of
    # decoding, the walk through the head's segments as long as decoding.
    is_jpeg = _starts(encoded, JPEG_BEGIN)
    jpeg = tf.where(is_jpeg, encoded, b"")  # Of others the search would be in vain.
    return is_jpeg & ~tf.strings.regex_full_match(jpeg, rb"\C*(Exif|http|Adobe)\C*")


def _decode_plain_jpeg(encoded, max_pixels):
    height, width, components = tf.unstack(tf.cast(tf.io.extract_jpeg_shape(encoded), tf.int64))
    return _decode_grey_or_rgb(encoded, height, width, components, max_pixels)


def _decode_grey_or_rgb(encoded, height, width, components, max_pixels):
    grey_or_colour = _require(
        (components == 1) | (components == 3),
        "Expected a grey or RGB JPEG. Received channels:",
        components,
    )
    with grey_or_colour, _require_size(width, height, max_pixels):
        # Pillow's inverse transform; TensorFlow's default is off by 1 to 2 of 255 levels.
        return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def _decode_jpeg_by_segments(encoded, max_pixels):
    def segment(at, exif, xmp, height, width, components):
        marker = _number(encoded, at, 2, big_endian=True)
        with _require(marker >= 0xFF00, "Expected a marker in the JPEG's head."):
            length = _number(encoded, at + 2, 2, big_endian=True)
        content = _cut(encoded, at + 4, tf.where(marker == 0xFFE1, length - 2, 0))
        in_exif = _cut(content, 0, 6) == b"Exif\0\0"
        exif = tf.where(in_exif, exif + _cut(content, 6, length), exif)
        xmp = tf.where(_cut(content, 0, len(XMP_BEGIN)) == XMP_BEGIN, content, xmp)
        frame = (marker >= 0xFFC0) & (marker <= 0xFFCF)
        frame &= (marker != 0xFFC4) & (marker != 0xFFC8) & (marker != 0xFFCC)
        height, width, components = tf.cond(
            frame,
            lambda: (
                _number(encoded, at + 5, 2, big_endian=True),
                _number(encoded, at + 7, 2, big_endian=True),
                _number(encoded, at + 9, 1),
            ),
            lambda: (height, width, components),
        )
        # Bytes of 0xFF may fill the space before a marker. The scan's data end the head.
        step = tf.where(marker == 0xFFFF, tf.constant(1, tf.int64), length + 2)
        at = tf.where(marker == 0xFFDA, -at, at + step)
        return at, exif, xmp, height, width, components

    zero = tf.constant(0, tf.int64)
    _, exif, xmp, height, width, components = tf.while_loop(
        lambda at, *rest: at > 0,
        segment,
        (tf.constant(2, tf.int64), tf.constant(b""), tf.constant(b""), zero, zero, zero),
    )
    image = _decode_grey_or_rgb(encoded, height, width, components, max_pixels)
    return _upright(image, _orientation_of(exif, xmp))


def _decode_png(encoded, max_pixels):
    width, height = (_number(encoded, at, 4, big_endian=True) for at in (16, 20))
    colour = _number(encoded, 25, 1)

    def chunk(at, exif, xmp, alpha):
        length = _number(encoded, at, 4, big_endian=True)
        kind = _cut(encoded, at + 4, 4)
        content = tf.stack([at + 8, length])
        exif = tf.where(kind == b"eXIf", content, exif)
        keyword = _cut(encoded, at + 8, 22)
        profile = (kind == b"zTXt") | (kind == b"tEXt") | (kind == b"iTXt")
        profile &= keyword == b"Raw profile type exif\0"
        is_xmp = (kind == b"iTXt") & (_cut(keyword, 0, 18) == b"XML:com.adobe.xmp\0")
        compressed = is_xmp & (_cut(keyword, 18, 1) != b"\0")
        with _require(~(profile | compressed), "Cannot read orientation from compressed text."):
            xmp = tf.where(is_xmp, content, xmp)
        at = tf.where(kind == b"IEND", -at, at + length + 12)
        return at, exif, xmp, alpha | (kind == b"tRNS")

    _, exif, xmp, alpha = tf.while_loop(
        lambda at, *rest: at > 0,
        chunk,
        (tf.constant(8, tf.int64), NOWHERE, NOWHERE, colour >= 4),
    )
    orientation = _orientation_of(_cut(encoded, *tf.unstack(exif)), _cut(encoded, *tf.unstack(xmp)))
    with tf.control_dependencies([orientation]), _require_size(width, height, max_pixels):
        # Where a palette of few bits has no alpha, TensorFlow 2.21 would make up a wrong one.
        image = tf.cond(
            alpha,
            lambda: _on_white(tf.io.decode_png(encoded, channels=4)),
            lambda: tf.io.decode_png(encoded, channels=3),
        )
    return _upright(image, orientation)


def _decode_webp(encoded, max_pixels):
    kind = _cut(encoded, 12, 4)

    def extended():
        flags = _number(encoded, 20, 1)
        return _number(encoded, 24, 3) + 1, _number(encoded, 27, 3) + 1, flags // 16 % 2

    def lossless():
        bits = _number(encoded, 21, 4)
        return bits % 2**14 + 1, bits // 2**14 % 2**14 + 1, bits // 2**28 % 2

    def lossy():
        return _number(encoded, 26, 2) % 2**14, _number(encoded, 28, 2) % 2**14, np.int64(0)

    width, height, alpha = tf.cond(
        kind == b"VP8X", extended, lambda: tf.cond(kind == b"VP8L", lossless, lossy)
    )

    end = tf.cast(tf.strings.length(encoded), tf.int64) - 8

    def chunk(at, exif, xmp):
        kind = _cut(encoded, at, 4)
        length = _number(encoded, at + 4, 4)
        content = tf.stack([at + 8, length])
        exif = tf.where(kind == b"EXIF", content, exif)
        xmp = tf.where(kind == b"XMP ", content, xmp)
        return at + 8 + length + length % 2, exif, xmp

    with tf.control_dependencies([alpha]):
        _, exif, xmp = tf.while_loop(
            lambda at, *rest: at <= end,
            chunk,
            (tf.constant(12, tf.int64), NOWHERE, NOWHERE),
        )
    orientation = _orientation_of(_cut(encoded, *tf.unstack(exif)), _cut(encoded, *tf.unstack(xmp)))

    def with_channels(channels):
        # Never 0, the file's own: TensorFlow 2.21 then writes beyond its buffer where it moves.
        image = tf.io.decode_image(encoded, channels, expand_animations=False)
        return tf.ensure_shape(image, [None, None, channels])

    with tf.control_dependencies([orientation]), _require_size(width, height, max_pixels):
        image = tf.cond(alpha == 1, lambda: _on_white(with_channels(4)), lambda: with_channels(3))
    return _upright(image, orientation)


def _decode_gif(encoded, max_pixels):
    width, height = (_number(encoded, at, 2) for at in (6, 8))

    def palette_size(flags):
        return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(np.int64(2), flags % 8), 0)

    data = tf.io.decode_raw(encoded, tf.uint8)

    def skip(at):
        """Past the blocks, each led by its length, that begin at a place."""
        body = lambda at: [at + tf.cast(tf.gather(data, at), tf.int64) + 1]  # noqa: E731
        (at,) = tf.while_loop(lambda at: tf.gather(data, at) > 0, body, [at])
        return at + 1

    def extension(at, control):
        is_control = _number(encoded, at + 1, 1) == 0xF9
        return skip(at + 2), tf.where(is_control, at, control)

    # Extensions, of which one may tell the transparent entry, precede the first frame.
    at, control = tf.while_loop(
        lambda at, control: _number(encoded, at, 1) == 0x21,
        extension,
        (13 + palette_size(_number(encoded, 10, 1)), tf.constant(0, tf.int64)),
    )
    place = [_number(encoded, at + 1 + 2 * i, 2) for i in range(4)]
    whole = (place[0] == 0) & (place[1] == 0) & (place[2] == width) & (place[3] == height)
    whole &= _number(encoded, at, 1) == 0x2C
    frame_flags = _number(encoded, at + 9, 1)
    palette = tf.where(frame_flags >= 128, at + 10, tf.constant(13, tf.int64))
    flags = tf.where(frame_flags >= 128, frame_flags, _number(encoded, 10, 1))

    def with_white_entry(encoded):
        """TensorFlow makes transparent pixels black: here none is, and their entry is white."""
        control_flags = _number(encoded, control + 3, 1)
        entry = palette + 3 * _number(encoded, control + 6, 1)
        opaque = _put(encoded, control + 3, tf.gather(ALL_BYTES, control_flags - 1))
        in_palette = entry < palette + palette_size(flags)
        return tf.cond(in_palette, lambda: _put(opaque, entry, bytes(WHITE)), lambda: opaque)

    transparent = (control > 0) & (_number(encoded, control + 3, 1) % 2 == 1)
    covered = _require(whole, "Expected a GIF whose first frame covers it.")
    with covered, _require_size(width, height, max_pixels):
        # TensorFlow would unpack all frames before it takes the first: gigabytes of a small file.
        pixels = at + 11 + tf.where(frame_flags >= 128, palette_size(frame_flags), 0)
        first = tf.strings.join([_cut(encoded, 0, skip(pixels)), b";"])
        first = tf.cond(transparent, lambda: with_white_entry(first), lambda: first)
        image = tf.io.decode_image(first, channels=3, expand_animations=False)
    return image


ALL_BYTES = [bytes([value]) for value in range(256)]


def _put(encoded, at, new):
    """The string with some bytes replaced, from a place on."""
    length = tf.cast(tf.strings.length(encoded), tf.int64)
    rest = at + tf.cast(tf.strings.length(new), tf.int64)
    return tf.strings.join([_cut(encoded, 0, at), new, _cut(encoded, rest, length)])


def _decode_bmp(encoded, max_pixels):
    head, bits, compression = (_number(encoded, at, n) for at, n in ((14, 4), (28, 2), (30, 4)))
    width, height = (tf.bitcast(_number32(encoded, at), tf.int32) for at in (18, 22))
    plain = (head >= 40) & (compression == 0) & ((bits == 24) | (bits == 32))
    with (
        _require(plain, "Expected a BMP of 24 or 32 bits, uncompressed. Received bits:", bits),
        _require_size(width, tf.abs(height), max_pixels),
    ):
        image = tf.io.decode_bmp(encoded, channels=0)[..., :3]
    return image


def _number32(encoded, at):
    return tf.cast(_number(encoded, at, 4), tf.uint32)


def _on_white(image):
    """Lays uint8 [H, W, 4] on white, rounded as Pillow does; returns uint8 [H, W, 3]."""

    def lay(begin, end):
        values = tf.cast(image[begin:end], tf.int32)
        alpha = values[..., 3:]
        # No 255 * 255 + 127 is half way between two levels: 255 is odd.
        return tf.cast((values[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)

    def lay_all():
        with _require_small(image):
            height, width = tf.unstack(tf.shape(image)[:2])
        return in_parts(lay, height, width, tf.zeros([0, width, 3], tf.uint8), joined=0)

    opaque = tf.reduce_min(image[..., 3]) == 255
    return tf.cond(opaque, lambda: image[..., :3], lay_all)


def _orientation_of(exif, xmp):
    """The orientation by EXIF data (empty: none) or, as Pillow has it, else by XMP; int32."""
    value = tf.cond(
        tf.strings.length(exif) > 0, lambda: _orientation_in_exif(exif), lambda: tf.constant(0)
    )

    def in_xmp():
        digit = tf.strings.regex_replace(
            xmp, r'(?s)^\C*?tiff:Orientation(?:="|>)([0-9])\C*$', r"\1"
        )
        found = tf.strings.length(digit) == 1
        return tf.strings.to_number(tf.where(found, digit, "1"), tf.int32)

    return tf.cond((value == 0) & (tf.strings.length(xmp) > 0), in_xmp, lambda: value)


def _orientation_in_exif(exif):
    """Of a TIFF's first directory the entry 0x0112; 0 where it is missing or unreadable."""
    exif = tf.strings.regex_replace(exif, r"^(?:Exif\x00\x00)+", "")
    data = tf.cast(tf.io.decode_raw(exif, tf.uint8), tf.int64)
    mark = _cut(exif, 0, 4)
    little = mark == b"II*\0"

    def numbers(values):  # [..., n] bytes to [...]
        weights = 256 ** np.arange(values.shape[-1], dtype=np.int64)
        return tf.reduce_sum(values * tf.where(little, weights, weights[::-1]), -1)

    def first_directory():
        begin = numbers(tf.ensure_shape(data[4:8], [4])) + 2
        space = (tf.size(data, tf.int64) - begin) // 12

        def read():
            count = numbers(tf.ensure_shape(data[begin - 2 : begin], [2]))
            count = tf.minimum(count, space)
            entries = tf.reshape(data[begin : begin + 12 * count], [-1, 12])
            kinds = numbers(entries[:, 2:4])
            single = numbers(entries[:, 4:8]) == 1
            wanted = (numbers(entries[:, :2]) == ExifTags.Base.Orientation.value) & single
            # Shorts begin the field of four bytes, longs fill it; Pillow takes no other kind.
            values = tf.where(kinds == 3, numbers(entries[:, 8:10]), numbers(entries[:, 8:12]))
            wanted &= (kinds == 3) | (kinds == 4)
            last = tf.boolean_mask(values, wanted)[-1:]
            last = tf.where((last >= 1) & (last <= 8), last, 1)
            return tf.cast(tf.reduce_sum(last), tf.int32)

        return tf.cond(space > 0, read, lambda: tf.constant(0))

    valid = (little | (mark == b"MM\0*")) & (tf.strings.length(exif) >= 8)
    return tf.cond(valid, first_directory, lambda: tf.constant(0))


# Of each format its kinds: how they are known, and how they are decoded.
KINDS = {
    "JPEG": (
        (_is_plain_jpeg, _decode_plain_jpeg),
        (lambda encoded: _starts(encoded, JPEG_BEGIN), _decode_jpeg_by_segments),
    ),
    "PNG": ((lambda encoded: _starts(encoded, PNG_BEGIN), _decode_png),),
    "WebP": ((lambda encoded: _starts(encoded, b"WEBP", 8), _decode_webp),),
    "GIF": ((lambda encoded: _starts(encoded, b"GIF8"), _decode_gif),),
    "BMP": ((lambda encoded: _starts(encoded, b"BM"), _decode_bmp),),
}
