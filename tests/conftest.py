"""Fixtures: the embedded model, and random models in the layout of the big checkpoints."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(scope="session")
def bundle():
    """The embedded model, loaded once; tests leave it without a cache."""
    import ditcache

    return ditcache.load("tiny")


@pytest.fixture
def pipe(bundle):
    """The diffusers pipeline of the embedded model; whatever a test attaches is taken off again."""
    import ditcache

    yield bundle.pipe
    ditcache.disable_cache(bundle.pipe)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders in diffusers layout with small random weights, by name."""
    from random_checkpoints import save_all

    return save_all(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def read_mp4():
    """Path and size of an mp4 -> uint8 frames [T, H, W, 3]."""
    import subprocess

    import imageio_ffmpeg
    import numpy as np

    def read(path, height, width):
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-i",
            path,
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-",
        ]
        raw = subprocess.run(command, capture_output=True, check=True).stdout
        return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)

    return read
