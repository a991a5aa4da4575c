"""Encoded images to pixels: what every file means, wherever it is read.

Pillow's first frame in RGB, upright by its EXIF orientation, what is transparent laid on white, of
16 bits the upper 8. `graph_decoder` does the same inside a TensorFlow graph.

Images come out as numbers (`decode`) or as Pillow's pictures (`open_image`).
"""

import contextlib
import functools
import hashlib
import io
import os
import re
import warnings

import numpy as np
import simplejpeg
from absl import logging
from PIL import ExifTags, Image, TiffImagePlugin

# Where Pillow's own limit makes an error of its warning: 2 GiB / 4 bytes / 3 channels, in pixels.
MAX_PIXELS = 178_956_970
WHITE = (255, 255, 255)
# What Pillow opens that is no picture, or that it hands to other programs.
NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# A 16-bit file whose values all stay below 2**12 holds 12 bits, as many cameras give.
TWELVE_BITS = 4096
# That are handed over at a time.
PART_PIXELS = 2**22

# `open_image` has a limit of its own, which a run can set; Pillow's would warn at half of it.
Image.MAX_IMAGE_PIXELS = None
# Of files that it reads all the same: odd EXIF data, palettes, chunks.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnreadableImage(ValueError):  # noqa: N818 It names what it is about.
    """An image that cannot be read; its text is the reason, without the image's name."""


def read_file(path: str | bytes) -> bytes:
    """Returns a file's bytes.

    Raises:
        UnreadableImage: when there is no such file, or it may not be read.
    """
    # Without waiting: a named pipe that lies in a folder would never answer.
    flag = getattr(os, "O_NONBLOCK", 0)
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | flag)) as file:
            return file.read()
    except IsADirectoryError:
        raise UnreadableImage("a folder") from None
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except OSError as error:
        raise UnreadableImage((error.strerror or type(error).__name__).lower()) from None


@functools.cache
def image_suffixes() -> frozenset[str]:
    """What the names of images end in: whatever the installed Pillow opens, in lower case."""
    _register_heif()
    Image.init()
    return frozenset(
        suffix
        for suffix, form in Image.registered_extensions().items()
        if form in Image.OPEN and form not in NO_PICTURES
    )


def kind_of_beginning(begin: bytes) -> str:
    """Whether a file that begins so is an "image" that is read, a "HEIC" that is not, or neither.

    Args:
        begin: the first BEGINNING bytes.
    """
    if _is_heif(begin):
        return "image" if _register_heif() else "HEIC"
    return "image" if SURE_SIGNATURES.match(begin) else ""


def open_image(encoded: bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image of any format that Pillow opens, whatever its name ends in.

    Args:
        encoded: the file's bytes.
        name: of the image, for warnings.
        max_pixels: width times height that is still decoded.

    Returns:
        The first frame in mode RGB, upright.

    Raises:
        UnreadableImage: when it cannot be decoded; its text says why.
    """
    with _plain_reasons(encoded):
        return _load_upright(_open_picture(encoded, max_pixels), encoded, name)


def decode(encoded: bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes an image as `open_image` does, to uint8 [H, W, 3].

    simplejpeg decodes JPEGs without a fault, in two thirds of Pillow's time and to the same pixels.
    What has a fault Pillow reads all the same, or says why not.
    """
    with _plain_reasons(encoded):
        pixels = _decode_jpeg(encoded, max_pixels)
        return _as_array(open_image(encoded, name, max_pixels)) if pixels is None else pixels


# The values of EXIF's tag, and what turns the stored picture upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Entries of Pillow's `info` that can hold the orientation; of TIFF Pillow itself sees to it.
ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
# How much of a file `kind_of_beginning` asks for.
BEGINNING = 32
JPEG_BEGIN, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
# ISO 14496-12 files, by the brand that follows "ftyp".
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
# How images begin; what does not go on as it should is cut off or damaged.
SIGNATURES = (JPEG_BEGIN, PNG_BEGIN, b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# The beginnings of images that no other kind of file shares.
SURE_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|8BPS\0\x01|qoif"
    # JPEG 2000 in its box and without; AVIF; PBM, PGM, PPM; BMP by its reserved and head's bytes.
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|....ftypavi[fs]|P[1-6]\s+[0-9#]"
    rb"|BM....\0\0\0\0...\0[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    re.DOTALL,
)


@functools.cache
def _register_heif():
    """Lets Pillow read HEIC where pillow-heif is installed; returns whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _is_heif(encoded):
    return encoded[4:8] == b"ftyp" and encoded[8:12] in HEIF_BRANDS


@contextlib.contextmanager
def _plain_reasons(encoded):
    """Turns whatever goes wrong inside into UnreadableImage."""
    try:
        yield
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet in broken files.
        raise UnreadableImage(_reason(encoded, error)) from None


def _open_picture(encoded, max_pixels):
    """Pillow's image, of which no more than the head is read yet."""
    image = _open(encoded)
    if image.format in NO_PICTURES:
        raise UnreadableImage(f"a {image.format} file, not a picture")
    if _has_planes_of_sixteen_bits(image):
        raise UnreadableImage("a TIFF of 16 bits, plane by plane; save it pixel by pixel")
    if image.width * image.height > max_pixels:
        raise UnreadableImage(
            f"{image.width} x {image.height} pixels, more than --max_pixels={max_pixels}"
        )
    return image


def _load_upright(image, encoded, name):
    raw_mode = _raw_mode(image)
    image = _load(image, encoded)
    rgb = image
    if image.mode != "RGB" or raw_mode or "transparency" in image.info:
        rgb = _to_rgb(image, raw_mode, encoded, name)
    transposition = TRANSPOSITIONS.get(_orientation(image))
    del image  # What is large should not be there three times.
    return rgb if transposition is None else rgb.transpose(transposition)


def _decode_jpeg(encoded, max_pixels):
    """The pixels of a JPEG, grey or in colours; None for what is another or has a fault."""
    if not encoded.startswith(JPEG_BEGIN):
        return None
    image = _open_picture(encoded, max_pixels)
    if image.mode not in ("RGB", "L"):
        return None
    try:
        return _upright(simplejpeg.decode_jpeg(encoded), _orientation(image))
    except ValueError:
        return None


def _upright(pixels, orientation):
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    return pixels.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else pixels


def _as_array(image):
    """In parts, of which Pillow holds each twice meanwhile, and would so hold a large image."""
    rows = max(1, PART_PIXELS // image.width)
    if rows >= image.height:
        return np.asarray(image)
    pixels = np.empty([image.height, image.width, 3], np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = image.crop((0, top, image.width, bottom))
    return pixels


def _open(encoded):
    try:
        return Image.open(io.BytesIO(encoded))
    except Image.UnidentifiedImageError:
        if not (_is_heif(encoded) and _register_heif()):
            raise
        return Image.open(io.BytesIO(encoded))


def _raw_mode(image):
    """How PNG and TIFF store what Pillow reduces to 8 bits or expands to them; else empty."""
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return ""
    arguments = image.tile[0].args
    raw_mode = arguments if isinstance(arguments, str) else arguments[0]
    return raw_mode if ";" in raw_mode else ""


def _has_planes_of_sixteen_bits(image):
    """Whether Pillow would take each byte of a plane for a pixel, as where TIFF is not packed."""
    if image.format != "TIFF" or not image.tile or image.tile[0].codec_name != "raw":
        return False
    tags = image.tag_v2
    bits, planes = tags.get(TiffImagePlugin.BITSPERSAMPLE), TiffImagePlugin.PLANAR_CONFIGURATION
    return tags.get(planes) == 2 and len(bits) > 1 and max(bits) > 8


def _load(image, encoded):
    try:
        image.load()
        return image
    except OSError as error:
        if image.format not in ("JPEG", "MPO") or "truncated" not in str(error):
            raise
        completed = _with_end_mark(encoded)
        if completed is None:
            raise
        return completed


def _with_end_mark(encoded):
    """A JPEG of which nothing but its last two bytes is missing; None where more is."""
    # What stands before the mark then makes no difference.
    encoded = encoded.rstrip(b"\xff")
    digests = []
    for more in (b"\x55" * 64, b""):
        image = Image.open(io.BytesIO(encoded + more + JPEG_END))
        try:
            digests.append(hashlib.sha256(image.tobytes()).digest())
        except OSError:
            return None
    return image if digests[0] == digests[1] else None


def _to_rgb(image, raw_mode, encoded, name):
    if image.mode == "F":
        raise UnreadableImage("floating-point values of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _from_sixteen_bits(image, raw_mode, name)
    if ";16" in raw_mode:
        # Pillow has kept the upper bytes only.
        _warn_of_twelve_bits(max(high for _, high in _extrema(image)) << 8, name)
    if image.mode == "La":  # Multiplied by its alpha, which Pillow takes back to LA alone.
        image = image.convert("LA")
    if image.mode == "P" and image.palette is None:  # Within ICNS.
        image = image.convert("RGBA")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if raw_mode == "RGB;16B" and image.mode == "RGB":
        image.paste(WHITE, mask=_transparent_of_sixteen_bits(image, encoded))
        return image
    if raw_mode in ("L;2", "L;4"):
        # Pillow leaves the transparent level at the file's depth.
        image.info["transparency"] *= {"L;2": 85, "L;4": 17}[raw_mode]
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    rgb = Image.new("RGB", image.size, WHITE)
    rgb.paste(rgba, mask=rgba)
    return rgb


def _transparent_of_sixteen_bits(image, encoded):
    # `image` has the upper bytes. Taken for the other byte order, the file gives the lower ones.
    lower = Image.open(io.BytesIO(encoded))
    lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
    key = np.array(image.info["transparency"])
    same = (np.asarray(image) == key >> 8) & (np.asarray(lower) == key & 255)
    return Image.fromarray(same.all(-1))


def _from_sixteen_bits(image, raw_mode, name):
    values = np.asarray(image)
    if raw_mode == "I;12":  # Stored as 12 bits, their range is known.
        values = values << 4
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnreadableImage(f"values from {low} to {high}; of integers 0 to 65535 are read")
    _warn_of_twelve_bits(high, name)
    # Pillow's own conversion clips at 255 instead of scaling.
    gray = np.right_shift(values, 8, out=np.empty(values.shape, np.uint8), casting="unsafe")
    rgb = Image.fromarray(gray).convert("RGB")
    if "transparency" in image.info:
        rgb.paste(WHITE, mask=Image.fromarray(values == image.info["transparency"]))
    return rgb


def _extrema(image):
    extrema = image.getextrema()
    return extrema if isinstance(extrema[0], tuple) else (extrema,)


def _warn_of_twelve_bits(high, name):
    if 0 < high < TWELVE_BITS:
        logging.log_first_n(
            logging.WARNING,
            "%s has 16 bits, of which the largest value takes 12 or fewer (%d): it is read as "
            "nearly black, as are others of the kind. Multiply such files by 16 (65535 is white).",
            1,
            name or "An image",
            high,
        )


def _orientation(image):
    if not any(source in image.info for source in ORIENTATION_SOURCES):
        return 1
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Whatever Pillow meets in broken EXIF data, the picture is whole.
        return 1


def _reason(encoded, error):
    """Why Pillow could not read an image, in plain words."""
    if not encoded:
        return "empty"
    if _is_heif(encoded) and not _register_heif():
        return "a HEIC file; pip install pillow-heif lets it be read"
    if isinstance(error, MemoryError):
        return "more than fits into the memory"
    text = re.sub(r"<[^>]* at 0x\w+>", "it", str(error)) or type(error).__name__
    cut = "truncated" in text.lower() or isinstance(error, EOFError)
    # A RIFF file, such as WebP, tells how long it is.
    cut |= encoded.startswith(b"RIFF") and len(encoded) < int.from_bytes(encoded[4:8], "little")
    unidentified = isinstance(error, Image.UnidentifiedImageError)
    if unidentified and _is_tiff_of_other_form(encoded):
        return "a TIFF of a form that Pillow does not read, such as 16 bits with alpha, or 64 bits"
    if cut or (unidentified and encoded.startswith(SIGNATURES)):
        return "cut off"
    if unidentified:
        return f"not an image: begins with {_beginning(encoded)}"
    return f"damaged: {text}"


def _is_tiff_of_other_form(encoded):
    if not encoded.startswith((b"II*\0", b"MM\0*")):
        return False
    try:
        TiffImagePlugin.TiffImageFile(io.BytesIO(encoded))
    except SyntaxError as error:
        return "unknown" in str(error)
    except Exception:  # Whatever it meets in what is cut off.
        return False
    return False


def _beginning(encoded):
    begin = encoded[:20]
    text = begin.decode("latin-1")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in begin):
        return repr(text) + ("..." if len(encoded) > len(begin) else "")
    return "the bytes " + begin[:8].hex(" ")
