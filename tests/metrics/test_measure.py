"""Every metric of a pair at once: equal to the single ones, best for equal videos, bad for bad ones."""

import math
import subprocess
import sys

import numpy as np
import pytest
from alexnet import backbone, random_alexnet, random_heads
from safetensors.torch import save_file

from ditcache.metrics import measure as module
from ditcache.metrics.latent import latent
from ditcache.metrics.measure import GOOD, MetricSettings, measure
from ditcache.metrics.psnr import psnr, psnr_per_frame
from ditcache.metrics.ssim import ssim, ssim_per_frame
from ditcache.metrics.temporal import flicker, temporal

RNG = np.random.default_rng(0)
WORLD = np.kron(RNG.random((6, 8, 3)), np.ones((8, 8, 1)))
CLIP = np.stack([WORLD[:40, t : t + 48] for t in range(5)]).astype(np.float32)
NOISY = np.clip(CLIP + 0.1 * RNG.standard_normal(CLIP.shape), 0, 1).astype(np.float32)
LATENTS = RNG.standard_normal((1, 4, 2, 5, 6))
KEYS = {*GOOD, "psnr_per_frame", "identical"}


def test_d2_every_metric_is_there_also_one_that_was_not_asked_for():
    found = measure(CLIP, NOISY, LATENTS, 1.1 * LATENTS, MetricSettings())
    assert found == {
        "psnr": psnr(CLIP, NOISY),
        "psnr_per_frame": psnr_per_frame(CLIP, NOISY),
        "worst_frame": min(psnr_per_frame(CLIP, NOISY)),
        "ssim": ssim(CLIP, NOISY),
        "ssim_worst_frame": min(ssim_per_frame(CLIP, NOISY)),
        "temporal": temporal(CLIP, NOISY),
        "flicker": flicker(CLIP, NOISY),
        "latent": latent(LATENTS, 1.1 * LATENTS),
        "identical": False,
        "lpips": None,
        "vmaf": None,
    }
    assert set(found) == KEYS
    plain = {type(value) for value in found.values()}
    assert plain <= {float, bool, list, type(None)} and type(found["psnr_per_frame"][0]) is float


def test_d31_nothing_beats_an_identical_video(tmp_path, monkeypatch):
    save_file({**backbone(random_alexnet()), **random_heads()}, tmp_path / "w.safetensors")
    monkeypatch.setattr(module, "find_ffmpeg", lambda: "ffmpeg")
    monkeypatch.setattr(module, "vmaf", lambda a, b: 100.0 if a is b else 50.0)
    settings = MetricSettings(lpips=str(tmp_path), vmaf=True)
    same = measure(CLIP, CLIP, LATENTS, LATENTS, settings)
    assert same["identical"] and same["psnr"] == same["worst_frame"] == math.inf
    assert same["temporal"] == same["flicker"] == same["latent"] == same["lpips"] == 0
    worse = measure(CLIP, NOISY, LATENTS, -LATENTS, settings)
    for name, direction in GOOD.items():
        ahead = same[name] - worse[name]
        assert (ahead if direction == "higher" else -ahead) > 0, name


def test_one_frame_has_no_motion_to_measure():
    found = measure(CLIP[:1], NOISY[:1], LATENTS, LATENTS, MetricSettings())
    assert found["temporal"] is None and found["flicker"] is None and found["psnr"] > 0
    assert measure(CLIP[:2], NOISY[:2], LATENTS, LATENTS, MetricSettings())["temporal"] > 0


def test_nan_in_a_frame_is_never_a_number():
    broken = NOISY.copy()
    broken[3, 20, 20] = np.nan
    found = measure(CLIP, broken, LATENTS, LATENTS, MetricSettings())
    names = ("psnr", "worst_frame", "ssim", "ssim_worst_frame", "temporal", "flicker")
    assert all(math.isnan(found[name]) for name in names) and not found["identical"]


def test_unequal_videos_are_refused():
    with pytest.raises(ValueError, match=r"psnr: reference is \(5, .*candidate is \(4, "):
        measure(CLIP, NOISY[:4], LATENTS, LATENTS, MetricSettings())
    with pytest.raises(ValueError, match="latent: reference is"):
        measure(CLIP, NOISY, LATENTS, LATENTS[:, :2], MetricSettings())


def test_d2_a_metric_that_cannot_run_says_why_before_anything_is_rendered(monkeypatch):
    with pytest.raises(ValueError, match=r"lpips: no file or folder nowhere"):
        MetricSettings(lpips="nowhere")

    def none():
        raise ValueError("vmaf: no ffmpeg with libvmaf")

    monkeypatch.setattr(module, "find_ffmpeg", none)
    with pytest.raises(ValueError, match="vmaf: no ffmpeg"):
        MetricSettings(vmaf=True)
    assert MetricSettings() == MetricSettings(lpips=None, vmaf=False)


def test_measuring_does_not_import_torch():
    code = (
        "import sys, numpy as np\n"
        "from ditcache.metrics.measure import MetricSettings, measure\n"
        "x = np.zeros((3, 12, 12, 3))\n"
        "measure(x, x, x, x, MetricSettings())\n"
        "import ditcache.metrics.bootstrap\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
