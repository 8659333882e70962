"""Loading from folders in the layout of the big checkpoints, and what is said when that cannot
be.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

import ditcache
from ditcache.cli import options
from ditcache.config import build, load_yaml
from ditcache.errors import ConfigError, DitcacheError
from ditcache.models.base import ZOO, Model
from ditcache.pipeline.chunks import warped


def model_of(name, **settings):
    node = OmegaConf.merge(load_yaml("model", name), settings)
    return build(OmegaConf.create({"model": node}), "model", Model)


PUBLISHED = {
    "wan": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 480, 832, 50, 5.0, None),
    "wan2.1_14b": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 720, 1280, 50, 5.0, None),
    "wan2.1_i2v_480p": ("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", 480, 832, 40, 3.0, None),
    "wan2.1_i2v_720p": ("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", 720, 1280, 40, 5.0, None),
    "wan2.2_t2v": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 720, 1280, 40, 12.0, 0.875),
    "wan2.2_i2v": ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", 720, 1280, 40, 5.0, 0.9),
    "wan2.2_ti2v": ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 704, 1280, 50, 5.0, None),
    "wan2.2_ti2v_image": ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 704, 1280, 50, 5.0, None),
    "chronoedit": ("nvidia/ChronoEdit-14B-Diffusers", 720, 1280, 50, 5.0, None),
    "self_forcing": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 480, 832, 4, 5.0, None),
    "longlive": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 480, 832, 4, 5.0, None),
    "causvid": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 480, 832, 3, 8.0, None),
    "krea_realtime": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 480, 832, 4, 5.0, None),
    "sfwan2.2": ("rand0nmr/SFWan2.2-T2V-A14B-Diffusers", 480, 832, 8, 12.0, 0.875),
}
CAUSAL = {  # weights, chunk, first chunk, steps as the model gets them, window, sink
    "self_forcing": ("gdhe17/Self-Forcing", 3, None, [1000, 937.5, 833.33, 625], 21, 0),
    "longlive": ("Efficient-Large-Model/LongLive-1.3B", 3, None, [1000, 937.5, 833.33, 625], 12, 3),
    "causvid": ("tianweiy/CausVid", 3, None, [1000, 757, 522], 21, 0),
    "krea_realtime": ("krea/krea-realtime-video", 3, None, [1000, 937.5, 833.33, 625], 6, 0),
    "sfwan2.2": (None, 3, 1, [1000, 985.51, 965.52, 936.17, 865.98, 819.88, 750, 631.58], 21, 0),
}


def test_published_settings():
    embedded = {name for name in options("model") if name.startswith("tiny")}
    assert embedded == {"tiny", "tiny_wan2.2", "tiny_i2v", "tiny_chronoedit", "tiny_causal"}
    assert set(options("model")) == {*PUBLISHED, *embedded}
    for name, expected in PUBLISHED.items():
        m = model_of(name)
        assert (m.path, m.height, m.width, m.steps, m.shift, m.boundary) == expected


@pytest.mark.parametrize("name", CAUSAL)
def test_published_settings_of_causal_models(name):
    m = model_of(name)
    weights, chunk, first, steps, window, sink = CAUSAL[name]
    assert (m.weights and m.weights.path) == weights
    assert (m.chunk, m.first_chunk, m.window, m.sink) == (chunk, first, window, sink)
    assert m.guidance == 1 and m.steps == len(m.timesteps) == len(steps)
    given = warped(m.timesteps, m.shift) if m.warp else m.timesteps
    assert given == pytest.approx(steps, abs=0.01)


@pytest.mark.parametrize(
    "name", ["wan", "wan2.1_i2v_480p", "wan2.2_t2v", "wan2.2_i2v", "chronoedit"]
)
def test_loads_a_local_folder(checkpoints, name):
    bundle = ditcache.load(name, path=str(checkpoints[name]), device="cpu", vae_tiling=True)
    assert bundle.pipe.transformer.dtype == torch.bfloat16
    assert bundle.pipe.vae.dtype == torch.float32
    assert bundle.pipe.vae.use_tiling
    assert len(bundle.experts) == (2 if "2.2" in name else 1)
    assert bundle.boundary == PUBLISHED[name][-1]


def test_plain_diffusers_loads_the_zoo_in_one_dtype():
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(ZOO / "wan-tiny")
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}


def test_the_wrong_pipeline_is_refused_before_weights_are_read(checkpoints):
    with pytest.raises(
        ConfigError, match="holds a WanImageToVideoPipeline, this model loads a WanPipeline"
    ):
        ditcache.load("wan", path=str(checkpoints["wan2.1_i2v_480p"]))


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ConfigError, match=r"has no model_index\.json"):
        ditcache.load("wan", path=str(tmp_path))


def test_a_damaged_index(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        ditcache.load("wan", path=str(tmp_path))


def test_a_damaged_folder(checkpoints, tmp_path):
    index = json.loads((checkpoints["wan"] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(DitcacheError, match=r"model\.path: cannot load"):
        ditcache.load("wan", path=str(tmp_path), device="cpu")


def test_offline_says_what_works_instead(tmp_path):
    """In a process of its own, without the suite's HF_HUB_OFFLINE: one line, nothing of the hub's."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", "from ditcache.cli import main; main()"]
    done = subprocess.run(
        [*command, "generate", "a cat", "model=wan", f"hydra.run.dir={tmp_path}/run"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "set model.path=<diffusers folder>, or model=tiny" in done.stderr
    assert not (tmp_path / "run").exists()


def test_offline_switch_says_what_works_instead():
    with pytest.raises(DitcacheError, match=r"set model.path=<diffusers folder>, or model=tiny"):
        ditcache.load("wan2.2_t2v", device="cpu")


def test_wrong_settings():
    with pytest.raises(ConfigError, match=r"model.pth: no such key. Did you mean 'path'\?"):
        ditcache.load("tiny", pth="x")
    with pytest.raises(ConfigError, match=r"no option 'tyny'. Did you mean 'tiny'\?"):
        ditcache.load("tyny")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["none", "model", "group"])
def test_on_a_gpu_with_offload(checkpoints, offload):
    bundle = ditcache.load("wan", path=str(checkpoints["wan"]), device="cuda", offload=offload)
    cache = ditcache.enable_cache(bundle, "interval", head=1)
    frames = bundle.pipe("a cat", height=32, width=32, num_frames=5, num_inference_steps=4).frames[
        0
    ]
    ditcache.disable_cache(bundle)
    assert frames.shape == (5, 32, 32, 3) and cache.trace.computed < len(cache.trace.decisions)
