"""embed_beam.py by Beam's direct runner, in two processes, where apache-beam is installed."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import small_collections as small

from isd_tf.data import datasets
from isd_tf.serving import embed

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = ROOT / "experiments" / "embed_beam.py"


def test_without_beam_it_says_what_is_missing(monkeypatch, capsys):
    import embed_beam

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(SystemExit):
        small.call(embed_beam, "--images=x", "--model=x", "--out=x", monkeypatch=monkeypatch)
    assert "pip install '.[beam]'" in capsys.readouterr().err


def test_two_processes_write_what_one_does(tmp_path):
    pytest.importorskip("apache_beam", reason="apache-beam is an extra")
    for i, image in enumerate(small.random_images(300)):
        small.write_image(tmp_path / "photos", f"{i:03d}.png", image)
    (tmp_path / "photos" / "100.png").write_bytes(b"")
    model, _ = small.export(tmp_path / "model")
    encoder = embed.load_encoder(model)
    dataset = datasets.load_collection(str(tmp_path / "photos"))
    for out in ("one", "several"):
        collection = embed.begin(tmp_path / out, encoder, dataset, shard_images=64)
        if out == "one":
            embed.embed_shards(encoder, dataset, collection, collection.missing)
            collection.finish()
    flags = [f"--images={tmp_path / 'photos'}", f"--model={model}", f"--out={tmp_path / out}"]
    flags += ["--runner=DirectRunner", "--direct_running_mode=multi_processing"]
    process = subprocess.run(
        [sys.executable, str(PROGRAM), *flags, "--direct_num_workers=2"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TF_ENABLE_ONEDNN_OPTS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "5 of 5 shards" in process.stdout and "Embeddings of 299 images" in process.stdout
    for name in ("embeddings.npy", "paths.txt", "unreadable.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / out / name).read_bytes()
    assert np.load(tmp_path / out / "embeddings.npy").shape == (299, small.DIMENSION)
