"""Unmodified diffusers pipelines that say little or nothing of where they are: image to video names
its branches, video to video and ChronoEdit do not even do that.
"""

import pytest
import torch
from by_hand import cached
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    WanVideoToVideoPipeline,
)
from PIL import Image
from test_exactness import DYNAMIC, FULL

import ditcache
from ditcache.cache import where
from ditcache.errors import DitcacheError

STEPS = 8
# Which skip something of random weights, and whose masks no calibration has to give.
SKIPPING = {
    "interval": {"every": 2, "head": 1},
    "taylorseer": {"every": 2, "head": 1},
    "fbcache": {"threshold": 10.0, "max_skips": 1},
    "seacache": {"threshold": 9.0, "max_skips": 1},
    "easycache": {"threshold": 9.0, "max_skips": 1, "head": 1},
    "dbcache": {"threshold": 10.0, "max_skips": 1, "front": 1, "head": 1},
    "cfg_delta": {"cfg": "delta", "head": 1},
}
EXACT = {k: v for k, v in FULL.items() if k not in ("planned", "scm", "magcache")}


def picture():
    return Image.linear_gradient("L").resize((48, 32)).convert("RGB")


class Video:
    """One way to call one pipeline, and what to expect of it."""

    def __init__(self, pipe, branches=("cond", "uncond"), steps=STEPS, **settings):
        self.pipe, self.branches, self.steps, self.settings = pipe, branches, steps, settings

    def __call__(self, **more):
        settings = {
            "prompt": "a cat",
            "negative_prompt": "blurred",
            "num_inference_steps": STEPS,
            "guidance_scale": 4.0,
            "output_type": "latent",
            "max_sequence_length": 512,
            "generator": torch.Generator().manual_seed(0),
            **self.settings,
            **more,
        }
        return self.pipe(**settings)[0]


@pytest.fixture(scope="module")
def pipes(checkpoints):
    names = ("wan", "wan2.1_i2v_480p", "wan2.2_i2v", "chronoedit")
    loaded = {
        name: ditcache.load(name, path=str(checkpoints[name]), dtype="float32", device="cpu").pipe
        for name in names
    }
    parts = {k: v for k, v in loaded["wan"].components.items() if k != "transformer_2"}
    torch.manual_seed(0)
    parts["vae"] = AutoencoderKLWan(  # of Wan2.1's layout, which this pipeline takes for granted
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    again = WanVideoToVideoPipeline(**parts)
    again.set_progress_bar_config(disable=True)
    return {**loaded, "video": again}


VIDEOS = {
    "i2v": lambda pipes: Video(
        pipes["wan2.1_i2v_480p"], image=picture(), height=32, width=48, num_frames=5
    ),
    "i2v two experts": lambda pipes: Video(
        pipes["wan2.2_i2v"], image=picture(), height=32, width=48, num_frames=5
    ),
    "video to video": lambda pipes: Video(
        pipes["video"], steps=5, video=[picture()] * 5, height=32, width=48, strength=0.7
    ),
    "chronoedit": lambda pipes: Video(
        pipes["chronoedit"], image=picture(), height=32, width=48, num_frames=5
    ),
    "chronoedit reasoning": lambda pipes: Video(
        pipes["chronoedit"],
        image=picture(),
        height=32,
        width=48,
        num_frames=29,
        enable_temporal_reasoning=True,
        num_temporal_reasoning_steps=4,
    ),
    "chronoedit distilled": lambda pipes: Video(
        pipes["chronoedit"],
        branches=("cond",),
        image=picture(),
        height=32,
        width=48,
        num_frames=5,
        guidance_scale=1.0,
    ),
}


@pytest.fixture(params=VIDEOS)
def video(request, pipes):
    return VIDEOS[request.param](pipes)


@pytest.mark.parametrize("policy", EXACT)
def test_nothing_skipped_nothing_changed(video, policy):
    plain = video()
    with cached(video.pipe, policy, **EXACT[policy]) as cache:
        for _ in range(2):
            assert torch.equal(video(), plain)
            units = [d for d in cache.trace.decisions if d.unit == 0]
            assert [(d.step, d.branch) for d in units] == [
                (step, branch) for step in range(video.steps) for branch in video.branches
            ]
            assert cache.store.stats()["bytes"] == 0
    assert torch.equal(video(), plain)


@pytest.mark.parametrize("policy", SKIPPING)
def test_what_is_skipped_stays_in_its_branch_and_run(video, policy):
    if policy == "cfg_delta" and len(video.branches) == 1:
        pytest.skip("there is no uncond branch to leave out")
    plain = video()
    with cached(video.pipe, policy, **SKIPPING[policy]) as cache:
        first = video()
        marks = [d.computed for d in cache.trace.decisions]
        other = video(prompt="a dog", generator=torch.Generator().manual_seed(1))
        assert torch.equal(video(), first) and not torch.equal(other, first)
        assert [d.computed for d in cache.trace.decisions] == marks
    skipped = {d.branch for d in cache.trace.decisions if not d.computed}
    assert skipped == ({"uncond"} if policy == "cfg_delta" else set(video.branches))
    assert first.isfinite().all() and not torch.equal(first, plain)
    assert (first - plain).norm() < plain.norm()
    with cached(video.pipe, policy, **SKIPPING[policy]):
        assert torch.equal(video(), first)


def test_the_frame_drop_forces_a_compute(pipes):
    video = VIDEOS["chronoedit reasoning"](pipes)
    with cached(video.pipe, "interval", every=9, head=1, tail=0) as cache:
        assert video().isfinite().all()
    reasons = {(d.step, d.branch): d.reason for d in cache.trace.decisions if d.computed}
    assert reasons == {
        (0, "cond"): "first",
        (0, "uncond"): "first",
        (4, "cond"): "shape",
        (4, "uncond"): "shape",
    }


@pytest.mark.parametrize("call", ["cond", "uncond"])
@pytest.mark.parametrize("name", ["video to video", "chronoedit", "i2v"])
def test_an_interrupted_run_leaves_nothing_behind(pipes, name, call):
    """Even where the next run starts with what would have been the other branch."""
    video = VIDEOS[name](pipes)
    with cached(video.pipe, "interval", every=2, head=1):
        expected = video(prompt="a dog")
    calls = ["cond", "uncond"].index(call) + 1

    def stop(module, args, kwargs):
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise KeyboardInterrupt

    with cached(video.pipe, "interval", every=2, head=1):
        handle = video.pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
        with pytest.raises(KeyboardInterrupt):
            video()
        handle.remove()
        assert torch.equal(video(prompt="a dog"), expected)


def test_several_videos_at_once(pipes):
    video = VIDEOS["chronoedit"](pipes)
    with cached(video.pipe, "interval", every=2, head=1):
        alone = [video(prompt=prompt) for prompt in ("a cat", "a dog")]
        shape = alone[0].shape[1:]
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        both = video(
            prompt=["a cat", "a dog"],
            negative_prompt=["blurred"] * 2,
            image=video.settings["image"],
            latents=torch.cat([noise, noise]),
        )
    assert torch.allclose(both, torch.cat(alone), atol=1e-4)


def test_branches_with_the_same_text(pipes):
    """The text tells branches apart by what it is, not by what it says."""
    video = VIDEOS["chronoedit"](pipes)
    plain = video(negative_prompt="a cat")
    with cached(video.pipe, "interval", every=1) as cache:
        assert torch.equal(video(negative_prompt="a cat"), plain)
    assert len(cache.trace.decisions) == 2 * STEPS


def forward(pipe, text, step=0):
    noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    return pipe.transformer(
        hidden_states=noise * (1 + step / 10),
        timestep=pipe.scheduler.timesteps[step].expand(1),
        encoder_hidden_states=text,
    )


def test_text_made_anew_for_every_call(pipes):
    pipe = pipes["wan"]
    texts = [torch.randn(1, 8, pipe.transformer.config.text_dim) for _ in range(2)]
    with cached(pipe, "interval", every=2, head=1) as cache:
        pipe.scheduler.set_timesteps(3)
        for step in range(3):
            for text in texts if step != 1 else texts[::-1]:
                out = forward(pipe, text.clone(), step).sample
            pipe.scheduler.step(out, pipe.scheduler.timesteps[step], torch.zeros(1, 16, 2, 4, 6))
    order = [(d.step, d.branch) for d in cache.trace.decisions]
    assert order[2:4] == [(1, "uncond"), (1, "cond")]
    assert [(step, branch) for step, branch in sorted(order)] == [
        (step, branch) for step in range(3) for branch in ("cond", "uncond")
    ]


def test_what_cannot_be_known_is_an_error(pipes):
    pipe, text = pipes["wan"], torch.zeros(1, 8, 64)
    with cached(pipe, "interval"):
        pipe.scheduler.set_timesteps(4)
        forward(pipe, text)
        with pytest.raises(DitcacheError, match="was there already, at step 0; call the trans"):
            forward(pipe, text)
        pipe.scheduler.set_timesteps(4)
        for _ in range(2):
            forward(pipe, torch.randn(1, 8, 64))
        with pytest.raises(DitcacheError, match="is none of the first step's, at step 0"):
            forward(pipe, torch.randn(1, 8, 64))
        pipe.scheduler.set_timesteps(4)
        with pytest.raises(DitcacheError, match="timestep 123 is none of the scheduler's"):
            pipe.transformer(
                hidden_states=torch.zeros(1, 16, 2, 4, 6),
                timestep=torch.tensor([123]),
                encoder_hidden_states=text,
            )
    with (
        cached(pipe.transformer, "interval"),
        pytest.raises(DitcacheError, match="neither the pipeline nor a scheduler"),
    ):
        forward(pipe, text)


def test_a_scheduler_that_does_not_move_is_an_error(pipes):
    """It is another one that steps; every forward would look like the first."""
    pipe, text = pipes["wan"], torch.zeros(1, 8, 64)
    pipe.scheduler.set_timesteps(4)
    with cached(pipe, "interval"), pipe.transformer.cache_context("cond"):
        forward(pipe, text)
        with pytest.raises(DitcacheError, match="branch cond was there already at step 0"):
            forward(pipe, text)


def test_the_first_step_is_found_as_the_scheduler_would():
    """Heun visits every timestep but the first twice; the second visit begins a step."""
    heun = FlowMatchHeunDiscreteScheduler()
    heun.set_timesteps(5)
    for index in (0, 2, 4):
        assert where.first_step(heun, heun.timesteps, heun.timesteps[index]) == index
    euler = FlowMatchEulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[0.9, 0.7, 0.5, 0.3])
    for index, timestep in enumerate(euler.timesteps):
        rounded = timestep.to(torch.bfloat16) / 1000
        assert where.first_step(euler, euler.timesteps, rounded) == index


def test_a_policy_of_one_branch_does_not_mind_its_name(pipes):
    """Where a pipeline calls its only branch otherwise."""
    pipe, skipped = pipes["wan"], {}
    for name in ("cond", "cond_uncond"):
        with cached(pipe, "seacache", threshold=9.0, head=1, max_skips=1) as cache:
            for step in range(STEPS):
                with pipe.transformer.cache_context(
                    name, step_index=step, num_inference_steps=STEPS, sigma=1 - step / STEPS
                ):
                    pipe.scheduler.set_timesteps(STEPS)
                    forward(pipe, torch.zeros(1, 8, 64), step)
        skipped[name] = [d.computed for d in cache.trace.decisions]
    assert skipped["cond"] == skipped["cond_uncond"] and not all(skipped["cond"])


def test_a_static_policy_waits_for_the_device_at_the_first_step_only(pipes, monkeypatch):
    video = VIDEOS["video to video"](pipes)
    looks = []
    monkeypatch.setattr(
        where,
        "first_step",
        lambda *args, original=where.first_step: looks.append(1) or original(*args),
    )
    monkeypatch.setattr(where, "same", lambda a, b: pytest.fail("compares what the text says"))
    with cached(video.pipe, "interval", every=2, head=1):
        video()
        video()
    assert len(looks) == 2


def test_policies_are_covered():
    assert set(DYNAMIC) - {"dicache"} <= SKIPPING.keys()
