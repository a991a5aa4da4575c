"""Image files, byte by byte where Pillow does not write what cameras and other programs do."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

# Large flat areas, so that the roundings of lossy formats stay small; no two sides are alike.
SCENE = np.asarray(
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (3, 4, 3), np.uint8)).resize((40, 30))
)
GREY = SCENE[..., :1]
# Noise below alpha 0, which nobody sees, and a ramp of half transparent pixels.
ALPHA = np.full((30, 40, 1), 255, np.uint8)
ALPHA[:10], ALPHA[10:20, :, 0] = 0, np.arange(40) * 6


def save(image, form, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def convert(mode):
    return Image.fromarray(SCENE).convert(mode)


def turned(form, orientation, image=SCENE, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(image, form, exif=exif, **options)


def chunk(kind, content):
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(values, depth, colour, *extra, after=(), interlaced=False):
    """Writes what Pillow does not: values [H, W, C] of up to 16 bits; colour is the format's."""
    height, width, _ = values.shape
    passes = [(0, 0, 1, 1)]
    if interlaced:  # Adam7: first row, first column, and the steps between rows and columns.
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)]
        passes += [(0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for top, left, down, right in passes:
        for row in values[top::down, left::right]:
            bits = (row.reshape(-1, 1).astype(np.int64) >> np.arange(depth)[::-1]) & 1
            rows += b"\0" + np.packbits(bits.astype(np.uint8).ravel()).tobytes()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    chunks = [chunk(b"IHDR", head), *extra, chunk(b"IDAT", zlib.compress(rows)), *after]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def bmp(bits, rows, height=30, head=40, compression=0, palette=b""):
    """A BMP of 40 pixels a row with the head that is wanted; `rows` as stored."""
    begin = 14 + head + len(palette)
    core = struct.pack("<IiiHHI", head, 40, height, 1, bits, compression)
    core = core.ljust(head, b"\0") if head >= 40 else struct.pack("<IHHHH", 12, 40, height, 1, bits)
    return struct.pack("<2sIHHI", b"BM", begin + len(rows), 0, 0, begin) + core + palette + rows


def gif_with_broken_second_frame():
    moving = save(
        convert("RGB").quantize(16),
        "GIF",
        save_all=True,
        append_images=[Image.new("P", (40, 30), 1)],
    )
    second = moving.rindex(b"\x2c\0\0\0\0")
    return moving[: second + 5] + b"\xff" * 300


def gif_with_small_frame():
    whole = bytearray(save(Image.new("L", (40, 30), 9), "GIF"))
    whole[6:10] = struct.pack("<HH", 60, 50)  # The picture is larger than its first frame.
    return bytes(whole)


def tiff(content, bits, samples, photometric, *more):
    """A TIFF of 40 x 30 pixels, not packed; `more` are tags of one short, the last in order."""
    all_bits = struct.pack("<H", bits) * samples
    # Up to four bytes stand in the entry, more behind the content.
    behind = all_bits if samples > 2 else b""
    place = 8 + len(content) if behind else int.from_bytes(all_bits, "little")
    entries = [(256, 4, 1, 40), (257, 4, 1, 30), (258, 3, samples, place), (259, 3, 1, 1)]
    entries += [(262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, samples), (278, 4, 1, 30)]
    entries += [(279, 4, 1, len(content)), *((tag, 3, 1, value) for tag, value in more)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    head = b"II*\0" + struct.pack("<I", 8 + len(content) + len(behind))
    return head + content + behind + struct.pack("<H", len(entries)) + directory


def packed_twelve_bits(values):
    """Two of them in three bytes."""
    first, second = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    return packed.astype(np.uint8).tobytes()


def icns(image):
    icon = save(image, "PNG")
    entry = b"ic07" + struct.pack(">I", len(icon) + 8) + icon  # 128 x 128
    return b"icns" + struct.pack(">I", len(entry) + 8) + entry


def exif_of(orientation, order="<", kind=3):
    entry = struct.pack(order + "HHI", 0x0112, kind, 1)
    value = struct.pack(order + {3: "H", 4: "I"}[kind], orientation).ljust(4, b"\0")
    other = struct.pack(order + "HHII", 0x0100, 4, 1, 40)
    mark = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    return mark + struct.pack(order + "H", 2) + other + entry + value + bytes(4)


def with_segments(jpeg, *segments):
    parts = (b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments)
    return jpeg[:2] + b"".join(parts) + jpeg[2:]
