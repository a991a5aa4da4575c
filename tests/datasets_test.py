import ast
import dataclasses
import os
import pathlib
import re
import socket

import numpy as np
import pytest
from PIL import Image

from isd_tf.data import datasets, folders, graph_decoder, photo_patches, pixels, tfds_builders


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10 + value), (value, value, value)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes in train and val, nested, beside things that are no images."""
    for split in ("train", "val"):
        for i, name in enumerate(("cat/1.jpg", "cat/deep/2.PNG", "dog/3.jpeg", "dog/4.webp")):
            write_image(tmp_path / split / name, i)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".hidden").mkdir()
    write_image(tmp_path / "train" / ".hidden" / "5.jpg")
    return tmp_path


def names(dataset, root):
    return [str(path).removeprefix(str(root) + "/") for path in dataset.paths]


def test_folder_with_classes(folder):
    train, test = datasets.load("folder", data_dir=str(folder))
    assert names(train, folder / "train") == [
        "cat/1.jpg",
        "cat/deep/2.PNG",
        "dog/3.jpeg",
        "dog/4.webp",
    ]
    assert train.class_names == test.class_names == ("cat", "dog")
    np.testing.assert_array_equal(train.labels, [0, 0, 1, 1])
    assert len(test) == 4 and test.name.endswith("val")


def test_flat_folder_is_unlabelled(tmp_path):
    for name in ("b.bmp", "a.gif", "sub/c.jpg"):
        write_image(tmp_path / name)
    train, test = datasets.load("folder", data_dir=str(tmp_path))
    assert names(train, tmp_path) == ["a.gif", "b.bmp", "sub/c.jpg"]
    assert test is None and not datasets.is_labelled(train)


def test_flat_train_folder_is_unlabelled(tmp_path):
    write_image(tmp_path / "train" / "a.jpg")
    train, test = datasets.load("folder", data_dir=str(tmp_path))
    assert len(train) == 1 and test is None and not datasets.is_labelled(train)


def test_linked_folders_are_followed_and_loops_are_not(folder):
    write_image(folder / "elsewhere" / "6.jpg")
    (folder / "train" / "bird").symlink_to(folder / "elsewhere")
    (folder / "train" / "dog" / "back").symlink_to(folder / "train")
    train, _ = datasets.load("folder", data_dir=str(folder))
    assert train.class_names == ("bird", "cat", "dog") and len(train) == 5


def test_an_image_beside_the_classes_is_named(folder, caplog):
    write_image(folder / "train" / "stray.jpg")
    train, _ = datasets.load("folder", data_dir=str(folder))
    assert len(train) == 5 and not datasets.is_labelled(train)
    assert "stray.jpg" in caplog.text


def test_fingerprints_tell_images_apart_and_not_where_they_are(folder, tmp_path):
    def fingerprint(root):
        return datasets.fingerprint(datasets.load("folder", data_dir=str(root))[0])

    before = fingerprint(folder)
    moved = tmp_path / "moved"
    moved.mkdir()
    for split in ("train", "val"):
        (folder / split).rename(moved / split)
    assert fingerprint(moved) == before
    write_image(moved / "train" / "cat" / "7.jpg")
    assert fingerprint(moved) != before
    arrays = [datasets.ArrayDataset("", np.full((2, 4, 4, 3), v, np.uint8)) for v in (1, 1, 2)]
    assert [datasets.fingerprint(a) == datasets.fingerprint(arrays[0]) for a in arrays] == [
        *(True, True, False)
    ]


def test_one_image_that_is_another_has_another_digest(folder):
    train, _ = datasets.load("folder", data_dir=str(folder))
    before = datasets.image_digests(train)
    assert before.dtype == np.uint32 and before.shape == (4,)
    paths = (*train.paths[:2], train.paths[2] + "x", train.paths[3])
    changed = datasets.image_digests(dataclasses.replace(train, paths=paths))
    np.testing.assert_array_equal(changed != before, [False, False, True, False])
    labels = train.labels + [0, 1, 0, 0]
    changed = datasets.image_digests(dataclasses.replace(train, labels=labels))
    np.testing.assert_array_equal(changed != before, [False, True, False, False])
    arrays = datasets.ArrayDataset("", np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1))
    assert len(set(datasets.image_digests(arrays))) == 3


def test_folders_that_cannot_be_used_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="--data_dir"):
        datasets.load("folder")
    with pytest.raises(FileNotFoundError, match="does not exist.*missing"):
        datasets.load("folder", data_dir=str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match="no image below .*empty, which holds no file at all.*.jpg"
    ):
        datasets.load("folder", data_dir=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="test folder .*holdout"):
        datasets.load("folder", test_split="holdout", data_dir=str(folder))
    with pytest.raises(FileNotFoundError, match="no subfolder 'trian'.*--train_split"):
        datasets.load("folder", train_split="trian", data_dir=str(folder))
    (folder / "train").rename(folder / "train2017")
    message = "no subfolder 'train'.*train2017, val, which look like.*--train_split"
    with pytest.raises(FileNotFoundError, match=message):
        datasets.load("folder", data_dir=str(folder))
    (folder / "train2017").rename(folder / "train")
    write_image(folder / "val" / "bird" / "1.jpg")
    with pytest.raises(ValueError, match="without: bird.*2 classes.*training folder itself"):
        datasets.load("folder", data_dir=str(folder))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *(("Train", "Val"), ("train", "Val"), ("training", "testing"), ("TRAIN", "valid")),
        *(("Training", "validation"), ("train", "Test")),
    ],
)
def test_splits_are_known_by_their_usual_names(tmp_path, train, test):
    for split in (train, test):
        for name in ("cat/1.jpg", "dog/2.jpg"):
            write_image(tmp_path / split / name)
    loaded = datasets.load("folder", data_dir=str(tmp_path))
    assert [dataset.name for dataset in loaded] == [str(tmp_path / train), str(tmp_path / test)]
    assert all(dataset.class_names == ("cat", "dog") for dataset in loaded)


def test_two_folders_that_may_be_meant_are_refused(tmp_path):
    for split in ("Train", "TRAIN", "val"):
        write_image(tmp_path / split / "cat" / "1.jpg")
    with pytest.raises(FileNotFoundError, match="TRAIN, Train. Say by --train_split"):
        datasets.load("folder", data_dir=str(tmp_path))


def test_training_and_test_images_are_never_taken_together(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / "archive" / split / "cat" / "1.jpg")
    with pytest.raises(ValueError, match=r"has train, val, which.*--data_dir=\S*/archive,"):
        datasets.load("folder", data_dir=str(tmp_path))
    (tmp_path / "archive" / "val").rename(tmp_path / "archive" / "cats")
    assert len(datasets.load("folder", data_dir=str(tmp_path))[0]) == 2


@pytest.mark.parametrize(
    ("folders_", "said"),
    [
        (("cats_train", "cats_test"), "but cats_test, cats_train, which look like parts"),
        (("trn", "dev"), "but dev, trn, which look like parts"),
        (
            ("cat/train", "cat/test", "dog/train", "dog/test"),
            "cat, .*dog have test, train, .*round",
        ),
        (("data/x_train", "data/x_eval"), "data has x_eval, x_train, .*--data_dir=.*data,"),
    ],
)
def test_parts_under_other_names_are_not_taken_together(tmp_path, folders_, said):
    for name in folders_:
        write_image(tmp_path / name / "1.jpg")
    with pytest.raises((FileNotFoundError, ValueError), match=said):
        datasets.load("folder", data_dir=str(tmp_path))


def test_what_could_be_a_part_is_a_class_where_nothing_is_its_counterpart(tmp_path):
    for name in ("bullet_train", "car", "dev"):
        write_image(tmp_path / name / "1.jpg")
    with pytest.raises(FileNotFoundError, match="bullet_train, dev"):
        datasets.load("folder", data_dir=str(tmp_path))
    (tmp_path / "dev").rename(tmp_path / "ship")
    assert len(datasets.load("folder", data_dir=str(tmp_path))[0]) == 3


def test_every_folder_beside_the_parts_is_named(tmp_path, caplog):
    for name in ("train", "training", "test", "val", "more"):
        write_image(tmp_path / name / "cat" / "1.jpg")
    datasets.load("folder", data_dir=str(tmp_path))
    assert "only train and test are read. Beside them are: more, training, val." in caplog.text


@pytest.mark.parametrize(
    ("known", "other", "how"),
    [("Cat", "cat", "only in capitals"), ("K\u00e4", "Ka\u0308", "only in how letters are stored")],
)
def test_classes_of_almost_one_name_are_told(tmp_path, known, other, how):
    for name in (f"train/{known}", "train/b", f"val/{other}"):
        write_image(tmp_path / name / "1.jpg")
    with pytest.raises(ValueError, match=f"{other} differs from {known} {how}.*: rename"):
        datasets.load("folder", data_dir=str(tmp_path))


def test_folders_by_date_can_be_taken_without_labels(tmp_path):
    for name in ("train/2021/1.jpg", "train/2022/2.jpg", "val/2023/3.jpg"):
        write_image(tmp_path / name)
    with pytest.raises(ValueError, match="without: 2023.*dates.*--data_dir"):
        datasets.load("folder", data_dir=str(tmp_path))
    train, test = datasets.load("folder", data_dir=str(tmp_path / "train"))
    assert len(train) == 2 and test is None and not datasets.is_labelled(train)


def test_what_systems_leave_behind_is_no_class_and_no_image(folder):
    before = datasets.load("folder", data_dir=str(folder))[0]
    for name in (
        *("@eaDir/x.jpg/SYNOPHOTO_THUMB_M.jpg", "cat/@eaDir/y.jpg", "$RECYCLE.BIN/x.jpg"),
        *("lost+found/x.jpg", "#recycle/x.jpg", "System Volume Information/x.jpg"),
        *("__MACOSX/cat/x.jpg", ".ipynb_checkpoints/x.jpg", "cat/._1.jpg", "_thumbs/x.jpg"),
    ):
        write_image(folder / "train" / name)
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / "train" / "cat" / "desktop.ini").write_bytes(b"x")
    after = datasets.load("folder", data_dir=str(folder))[0]
    assert after.paths == before.paths and after.class_names == before.class_names
    assert names(after, folder / "train") == names(before, folder / "train")
    assert names(dataclasses.replace(after, paths=after.left_out), folder) == [
        "train/cat/notes.txt"
    ]


def test_whatever_pillow_opens_is_read_and_the_rest_is_counted(tmp_path):
    read = ("1.tif", "2.TIFF", "3.jfif", "4.jpe", "5.avif", "6.jp2", "7.ppm", "8.JPG")
    for name in (*read, "9.heic", "9.pdf", "9.eps", "9.h5", "9", "10.pdf"):
        (tmp_path / "train" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "cat" / name).write_bytes(b"")
    train, _ = datasets.load("folder", data_dir=str(tmp_path))
    assert names(train, tmp_path / "train" / "cat") == list(read)
    assert datasets.describe(train) == (
        f"{tmp_path}/train: 8 images of one class, cat: there is nothing to tell apart. 6 files "
        "not read: 2 .pdf, 1 without suffix, 1 .eps, 1 .h5, 1 .heic (pip install pillow-heif)."
    )
    for name in read:
        (tmp_path / "train" / "cat" / name).unlink()
    with pytest.raises(ValueError, match="which holds 6 files: 2 .pdf, 1 without suffix"):
        datasets.load("folder", data_dir=str(tmp_path))


def test_the_description_names_the_smallest_and_the_largest_class(folder):
    write_image(folder / "train" / "@odd\n" / "1.jpg")
    train, test = datasets.load("folder", data_dir=str(folder))
    assert f"5 images of 3 classes, from @odd{chr(92)}n with 1 to cat with 2. 1 file not" in (
        datasets.describe(train)
    )
    assert "4 images of 3 classes, from @odd\\n with 0 to cat with 2." in datasets.describe(test)
    arrays = datasets.ArrayDataset("x", np.zeros((4, 2, 2, 3)), np.array([0, 1, 0, 1]))
    assert datasets.describe(arrays) == "x: 4 images of 2 classes, 2 of each."
    assert datasets.describe(dataclasses.replace(arrays, labels=None)) == (
        "x: 4 images without labels."
    )


def test_names_that_are_no_utf8_pass_unharmed(tmp_path):
    folder = os.fsencode(tmp_path) + b"/train/caf\xe9"
    os.makedirs(folder)
    Image.new("RGB", (3, 2)).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", folder + b"/\xe9\n.png")
    train, _ = datasets.load("folder", data_dir=str(tmp_path))
    assert pixels.open_image(pixels.read_file(train.paths[0])).size == (3, 2)
    assert os.fsencode(train.class_names[0]) == b"caf\xe9"
    datasets.describe(train).encode("ascii")
    (tmp_path / "list.txt").write_bytes(b"train/caf\xe9/2.png\tcaf\xe9\n")
    os.rename(folder + b"/\xe9\n.png", folder + b"/2.png")
    listed, _ = datasets.load("list", image_list=str(tmp_path / "list.txt"))
    assert os.path.isfile(listed.paths[0]) and listed.class_names == train.class_names


def test_a_link_to_nothing_is_an_image_until_it_is_read(folder):
    (folder / "train" / "cat" / "x.jpg").symlink_to("/nowhere")
    assert len(datasets.load("folder", data_dir=str(folder))[0]) == 5


CONTENTS = {
    "photo": "JPEG", "a.dat": "PNG", "b.bin": "GIF", "c.001": "WEBP", "d.": "BMP", "e.x": "TIFF",
    "f.y": "PPM", "g.z": "JPEG2000", "h": "AVIF", "IMG.JPG~": "JPEG",
}  # fmt: skip


def test_content_decides_where_the_suffix_does_not(tmp_path, caplog):
    for name, form in CONTENTS.items():
        with open(tmp_path / name, "wb") as file:
            Image.new("RGB", (30, 20), "red").save(file, form)
    others = {
        "notes": b"BMW, P3 and II* are no images",
        "readme.txt": (tmp_path / "photo").read_bytes(),
        "raw.nef": (tmp_path / "e.x").read_bytes(),
        "empty": b"",
        "sound": b"RIFF\x24\0\0\0WAVEfmt ",
        "film": b"\0\0\0\x18ftypmp42\0\0\0\0",
        "phone": b"\0\0\0\x18ftypheic\0\0\0\0",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    found = folders.scan(str(tmp_path), labelled=False)
    assert [os.path.basename(path) for path in found.paths] == sorted(CONTENTS)
    assert [os.path.basename(path) for path in found.left_out] == sorted(others)
    assert re.findall("Not read: .*", caplog.text) == [
        f"Not read: {tmp_path}/phone, a HEIC file. pip install pillow-heif lets it be read."
    ]
    for path in found.paths:
        image = np.asarray(pixels.open_image(pixels.read_file(path)))
        assert image.shape == (20, 30, 3) and abs(image[10, 15].astype(int) - [255, 0, 0]).max() < 5
    assert graph_decoder.graph_formats(found.paths) == ("JPEG", "PNG", "WebP", "GIF", "BMP")
    (tmp_path / "named.jpg").write_bytes((tmp_path / "c.001").read_bytes())
    assert graph_decoder.graph_formats([str(tmp_path / "named.jpg")] * 200) == ("JPEG", "WebP")
    assert graph_decoder.graph_formats(["a.gif", "b.JPG"]) == ("JPEG", "GIF")


def test_only_files_of_unknown_suffix_are_looked_into_and_of_one_suffix_not_all(
    tmp_path, monkeypatch
):
    looked = []
    monkeypatch.setattr(folders, "kind_of_beginning", lambda begin: looked.append(begin) or "")
    monkeypatch.setattr(folders, "LOOKED_INTO", 3)
    for name in ("a.jpg", "b.txt", "c.TIFF", "d.mp4"):
        (tmp_path / name).write_bytes(b"x")
    folders.scan(str(tmp_path), labelled=False)
    assert not looked
    for i in range(6):
        (tmp_path / f"{i}.cls").write_text("7")
    assert len(folders.scan(str(tmp_path), labelled=False).left_out) == 8
    assert looked == [b"7"] * 3


def test_pipes_sockets_and_devices_are_named_and_never_opened(tmp_path, caplog):
    write_image(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.png").symlink_to("pipe.jpg")
    (tmp_path / "null.png").symlink_to("/dev/null")
    (tmp_path / "self.png").symlink_to("self.png")  # A link to nothing, to be named when read.
    (tmp_path / "self").symlink_to("self")
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(tmp_path)  # A socket's path may have 107 bytes.
        listener.bind("socket.jpg")
        os.chdir(before)
        found = folders.scan(str(tmp_path), labelled=True)
    assert [os.path.basename(path) for path in found.paths] == ["a.jpg", "self.png"]
    assert [os.path.basename(path) for path in found.left_out] == ["self"]
    for name in ("pipe.jpg", "link.png", "null.png", "socket.jpg"):
        assert f"Not read: {tmp_path}/{name}, a pipe, socket or device." in caplog.text
    with pytest.raises(pixels.UnreadableImage, match="symbolic links"):
        pixels.read_file(found.paths[1])


ODD_NAMES = (
    "new\nline", "\x1b[31mred", "\u202eevil", "caf\udce9", "tab\tx", "🐈 猫 Kätzchen", "$x$<b>",
    "\r" + "x" * 254, " blank ", "a\u2028b", "%s{0}",
)  # fmt: skip


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_whatever_a_folder_is_called_what_is_said_of_it_is_a_line_of_text(tmp_path, name, caplog):
    root = tmp_path / name
    for part in ("train", "val"):
        write_image(root / part / name / f"{name[:250]}.jpg")
        write_image(root / part / "b" / "2.jpg")
        (root / part / "b" / name).write_bytes(b"x")
    write_image(root / "train" / name / "3.jpg")
    said = [datasets.describe(dataset) for dataset in datasets.load("folder", data_dir=str(root))]
    (root / "empty" / name).mkdir(parents=True)
    (root / "empty" / name / name).write_bytes(b"x")
    (root / name).mkdir()
    write_image(root / "val" / f"{name[:-1]}y" / "1.jpg")
    (root / "list").write_bytes(os.fsencode(f"{name[1:]}x.jpg".replace("\n", "").replace("\r", "")))
    for arguments in (
        dict(name="folder", data_dir=str(root)),
        dict(name="folder", data_dir=str(root / "empty")),
        dict(name="folder", data_dir=str(root / "gone")),
        dict(name="folder", data_dir=str(root), train_split=name[1:]),
        dict(name="folder", data_dir=str(root), test_split=name[1:]),
        dict(name="list", image_list=str(root / "list")),
        dict(name="list", image_list=str(root / "gone")),
    ):
        with pytest.raises((ValueError, OSError)) as error:
            datasets.load(**arguments)
        said.append(str(error.value))
    said += [record.getMessage() for record in caplog.records]
    for text in said:
        assert text.isprintable(), text
        text.encode()
    assert len(said) >= 9


def load_list(folder, text, **arguments):
    path = folder / "list.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return datasets.load("list", image_list=str(path), **arguments)


def test_plain_list(folder):
    train, test = load_list(folder, "train/dog/3.jpeg\n\ntrain/cat/1.jpg\n")
    assert names(train, folder) == ["train/dog/3.jpeg", "train/cat/1.jpg"]
    assert test is None and not datasets.is_labelled(train)


def test_list_with_class_names(folder):
    train, _ = load_list(folder, "train/dog/3.jpeg\twolf\ntrain/cat/1.jpg\tcat\n")
    assert train.class_names == ("cat", "wolf")
    np.testing.assert_array_equal(train.labels, [1, 0])


def test_list_of_the_unbalanced_study(folder):
    text = "class names : \ndog\ncat\nTrain Images: \n/train/cat/1.jpg\n/train/dog/4.webp\n"
    train, _ = load_list(folder, text, data_dir=str(folder))
    assert train.class_names == ("dog", "cat")  # Their order tells large classes from small.
    np.testing.assert_array_equal(train.labels, [1, 0])
    assert names(train, folder) == ["train/cat/1.jpg", "train/dog/4.webp"]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("train/cat/1.jpg\ntrain/cat/9.jpg\n", FileNotFoundError, "1 files.*of 2.*9.jpg.*relative"),
        ("\n", ValueError, "lists no image"),
        ("train/cat/1.jpg\tcat\ntrain/dog/3.jpeg\n", ValueError, "Line 1 has one.*in line 2"),
        ("train/cat/1.jpg\n\ntrain/dog/3.jpeg\tx\n", ValueError, "Line 1 has none.*in line 3"),
        ("train/cat/1.jpg\tcat\tx\n", ValueError, "no third column.*in line 1 of .*list.txt"),
        ("train/cat/1.jpg\t \n", ValueError, "class name behind the tab.*in line 1"),
        ("\tcat\n", ValueError, "path before the tab.*in line 1"),
        (
            "train/cat/1.jpg\tcat\ntrain/cat/1.jpg\tcat\ntrain/cat/1.jpg\tdog\n",
            ValueError,
            "one class name.*Line 1 has 'cat'.*in line 3",
        ),
        ("train/cat/1.jpg cat\n", FileNotFoundError, "looks like 'path label': put a tab"),
        ("train/cat/1.jpg,cat\n", FileNotFoundError, "looks like 'path,label': put a tab"),
        ("train\\cat\\1.jpg\n", FileNotFoundError, "Line 1 has .* write / instead"),
        ("train/cat/1.jpg|cat\n", FileNotFoundError, "looks like 'path.label': put a tab"),
        (
            "0,train/cat/1.jpg,cat\n",
            FileNotFoundError,
            "more than the path train/cat/1.jpg: a line",
        ),
        ("cat train/cat/1.jpg\n", FileNotFoundError, "more than the path train/cat/1.jpg: a line"),
        ("cat\ttrain/cat/1.jpg\n", FileNotFoundError, "Line 1 has the class name first"),
        ("\n'train/cat/1.jpg'\n", FileNotFoundError, "Line 2 has quotes"),
        ("/train/cat/1.jpg\n", FileNotFoundError, "Line 1 begins with /"),
        ("path,label\ntrain/cat/1.jpg,cat\n", FileNotFoundError, "Line 2 looks like 'path,label'"),
        ("path\tlabel\ntrain/cat/1.jpg\tcat\n", FileNotFoundError, "Line 1 looks like a heading"),
        ("train/cat\n", FileNotFoundError, "Line 1 names a folder"),
        ("train/cat/1.jpg\ta\n./train/cat/1.jpg\tb\n", ValueError, "one class name.*in line 2"),
        (b"train/cat/\xe9.jpg\n", FileNotFoundError, r"cat/.udce9.jpg.*not UTF-8 but.*Latin-1"),
        ("train/cat/1.jpg\n".encode("utf-16-le"), ValueError, "Line 1 of.*UTF-16 without"),
        (b"\xff\xfex", ValueError, "begins as UTF-16 but is not.*Save it as UTF-8"),
        ("class names :\ncat\nTrain Images:\n/train/dog/3.jpeg\n", ValueError, "outside.*dog/3"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(folder, text, error, message):
    with pytest.raises(error, match=message):
        load_list(folder, text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("line_end", ["\r\n", "\n", "\r"])
def test_lists_as_editors_save_them_are_read(folder, encoding, line_end):
    text = line_end.join(["train/dog/3.jpeg\tKätzchen", "", "train/cat/1.jpg\t猫", ""])
    train, _ = load_list(folder, text.encode(encoding))
    assert names(train, folder) == ["train/dog/3.jpeg", "train/cat/1.jpg"]
    assert train.class_names == ("Kätzchen", "猫")
    text = line_end.join(["class names : ", "dog", "cat", "Train Images: ", "/train/cat/1.jpg", ""])
    train, _ = load_list(folder, text.encode(encoding), data_dir=str(folder))
    assert names(train, folder) == ["train/cat/1.jpg"] and train.class_names == ("dog", "cat")


def test_lists_that_were_put_together_have_marks_in_the_middle(folder):
    text = "\ufefftrain/cat/1.jpg\r\n\ufefftrain/dog/3.jpeg\r\n"
    train, _ = load_list(folder, text.encode("utf-8"))
    assert names(train, folder) == ["train/cat/1.jpg", "train/dog/3.jpeg"]


def test_a_folder_in_place_of_a_list_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a file.*a folder"):
        datasets.load("list", image_list=str(tmp_path))


def test_missing_list_is_refused():
    with pytest.raises(FileNotFoundError, match="list of images does not exist.*nowhere.txt"):
        datasets.load("list", image_list="nowhere.txt")
    with pytest.raises(ValueError, match="--image_list"):
        datasets.load("list")


def test_photo_patches():
    train, test = datasets.load("photo_patches")
    assert (len(train), len(test)) == (10_800, 2700)
    assert train.class_names[0] == "astronaut" and len(train.class_names) == 18


@pytest.mark.parametrize("module", [datasets, photo_patches, tfds_builders])
def test_what_is_slow_to_import_is_imported_where_it_is_needed(module):
    tree = ast.parse(pathlib.Path(module.__file__).read_text())
    at_once = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name.split(".")[0] for node in at_once for alias in node.names}
    assert not names & {"tensorflow_datasets", "skimage"}
