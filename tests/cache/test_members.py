"""Every policy on every trained member of the zoo, through diffusers' own pipelines: where nothing
is skipped nothing changes, and where something is, the video stays near.
"""

from functools import cache as remembered

import numpy as np
import pytest
import torch
from by_hand import cached
from PIL import Image
from test_exactness import FULL, SKIPPING

import ditcache
from ditcache.metrics.psnr import psnr
from ditcache.models.base import ZOO
from ditcache.pipeline.denoise import denoise
from ditcache.pipeline.inputs import draw_inputs
from ditcache.pipeline.text import encode_text

STEPS, DROP, HIGH = 6, 3, 2  # steps, the one at which frames are dropped, of the high-noise expert
OPTIONS = {
    "wan22-tiny": "tiny_wan2.2",
    "wan-i2v-tiny": "tiny_i2v",
    "chronoedit-tiny": "tiny_chronoedit",
}
REASONING = {
    "num_frames": 29,
    "enable_temporal_reasoning": True,
    "num_temporal_reasoning_steps": DROP,
}
VIDEOS = {
    "wan22-tiny": ("a white cross moves up on a cloudy brown background", {"num_frames": 17}),
    "wan-i2v-tiny": ("a red star moves left on a striped blue background", {"num_frames": 17}),
    "chronoedit-tiny": ("the star becomes yellow", {"num_frames": 5}),
    "chronoedit-tiny, reasoning": ("the star becomes yellow", REASONING),
}


@remembered
def bundle_of(member):
    return ditcache.load(OPTIONS[member])


def picture_of(member):
    own = bundle_of(member).model.own_picture
    return None if own is None else Image.open(own).convert("RGB")


class Video:
    """One way to call one member's pipeline."""

    def __init__(self, name):
        self.member = name.split(",")[0]
        self.bundle = bundle_of(self.member)
        self.pipe, (self.prompt, self.settings) = self.bundle.pipe, VIDEOS[name]

    def __call__(self, steps=STEPS, output_type="latent", **more):
        picture = picture_of(self.member)
        return self.pipe(
            prompt=self.prompt,
            height=64,
            width=64,
            num_inference_steps=steps,
            guidance_scale=4.0,
            output_type=output_type,
            generator=torch.Generator().manual_seed(5),
            **({} if picture is None else {"image": picture}),
            **{"max_sequence_length": 512 if picture else 64, **self.settings, **more},
        )[0]


@remembered
def uncached(name):
    return Video(name)()


@pytest.fixture(params=VIDEOS)
def name(request):
    yield request.param
    ditcache.disable_cache(bundle_of(request.param.split(",")[0]))


@pytest.mark.parametrize("policy", FULL)
def test_nothing_skipped_and_disabled_are_bit_exact(name, policy):
    video, plain = Video(name), uncached(name)
    with cached(video.pipe, policy, **FULL[policy]) as cache:
        assert torch.equal(video(), plain)
        assert cache.trace.computed == len(cache.trace.decisions) > 0
        assert cache.store.stats()["bytes"] == 0
    assert torch.equal(video(), plain)


@pytest.mark.parametrize("policy", SKIPPING)
def test_skipping_stays_finite_and_near_and_repeats(name, policy):
    video, plain = Video(name), uncached(name)
    with cached(video.pipe, policy, head=1, **SKIPPING[policy]) as cache:
        first = video()
        assert torch.equal(video(), first)
        decisions = [d for d in cache.trace.decisions if d.unit in (0, -1)]
    assert first.isfinite().all() and first.shape == plain.shape
    assert (first - plain).norm() < plain.norm()
    if "reasoning" in name:
        at_drop = [d for d in decisions if d.step == DROP]
        assert at_drop and all(d.computed for d in at_drop), "residuals of dropped frames were used"
    if name == "wan22-tiny":
        at_switch = [d for d in decisions if d.step == HIGH]
        assert at_switch and all(d.computed for d in at_switch)


def test_the_first_expert_is_freed_at_the_boundary():
    video, held = Video("wan22-tiny"), {}
    with cached(video.pipe, "taylorseer", every=2, head=1, tail=0) as cache:

        def watch(pipe, step, timestep, tensors):
            held[step] = {
                expert: cache.store.nbytes(cache.run.generation.number, expert)
                for expert in ("transformer", "transformer_2")
            }
            return tensors

        video(callback_on_step_end=watch)
    assert held[0]["transformer"] > 0 == held[0]["transformer_2"]
    assert all(held[step]["transformer"] == 0 for step in range(HIGH - 1, STEPS))
    assert held[HIGH]["transformer_2"] > 0


@pytest.mark.parametrize("name", VIDEOS)
def test_the_loop_is_diffusers(name):
    video = Video(name)
    bundle, steps = video.bundle, STEPS
    text = encode_text(bundle, video.prompt, negative_prompt="", guidance=4.0)
    frames = video.settings["num_frames"]
    picture = picture_of(video.member)
    inputs = draw_inputs(
        bundle, text, height=64, width=64, num_frames=frames, seed=5, picture=picture
    )
    reasoning = getattr(bundle.model, "reasoning_steps", None)
    if "reasoning" in name:
        bundle.model.reasoning_steps = DROP
    try:
        latents = denoise(bundle, inputs, steps=steps, guidance=4.0)
    finally:
        if reasoning is not None:
            bundle.model.reasoning_steps = reasoning
    assert torch.equal(latents, Video(name)(max_sequence_length=512))


def test_a_usual_cache_keeps_the_video(name):
    """24 steps, the settings people start with."""
    video = Video(name)
    more = {} if "reasoning" not in name else {"num_temporal_reasoning_steps": 8}
    plain = np.asarray(video(24, "np", **more))[0]
    with cached(video.pipe, "taylorseer") as cache:
        fast = np.asarray(video(24, "np", **more))[0]
    assert cache.trace.computed < len(cache.trace.decisions)
    assert psnr(plain, fast) > 25


@pytest.mark.parametrize("member", OPTIONS)
def test_a_member_has_a_card_and_little_of_its_own(member):
    folder = ZOO / member
    own = sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".json"))
    assert own <= 7_000_000
    card = (folder / "CARD.md").read_text()
    assert "Recipe" in card and "Accuracy" in card and (folder / "sample.png").is_file()
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_the_whole_zoo_is_small():
    assert sum(p.stat().st_size for p in ZOO.rglob("*") if p.is_file()) <= 25_000_000
