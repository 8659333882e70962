"""Long videos: what a segment takes over, how segments are joined, and that no join can be seen."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

import ditcache
from ditcache import cli
from ditcache.cli import conf_dir
from ditcache.commands.generate import GenerateSettings
from ditcache.config import build
from ditcache.errors import ConfigError
from ditcache.pipeline import segments
from ditcache.pipeline.denoise import decode_latents
from ditcache.pipeline.inputs import Inputs
from ditcache.pipeline.render import Renderer

TEXT = "a yellow square moves down on a checkered green background"
JUMP = 1.7  # the mean change at the joins may be so many times that between other frames


def settings(*overrides):
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return build(compose("generate", [*overrides]), "", GenerateSettings)


def rendered(bundle, *overrides, seed=0, text=TEXT):
    s = settings(*overrides)
    renderer = Renderer(bundle, s, lambda *_: None)
    return renderer.render(0, text, s.cache, s.pictures[0], seed=seed)


def jumps(frames, joins):
    """Mean absolute change from frame to frame at the joins, over that between the others. joins:
    numbers of the frames that come after one.
    """
    change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    at = np.array(joins) - 1
    return change[at].mean() / np.delete(change, at).mean()


@pytest.fixture(scope="module")
def long(bundle):
    return rendered(bundle, "segments=3", "steps=8")


def test_latents_are_held_exactly_and_decoded_in_one_go(bundle, long):
    s = settings("segments=3")
    assert s.held == 3 and s.total_frames == 17 + 2 * 8 == len(long.frames)
    assert long.latents.shape == (1, 16, 5 + 2 * 2, 8, 8)
    assert np.array_equal(decode_latents(bundle, long.latents), long.frames)
    assert len(long.segment_seconds) == 3
    assert sum(long.segment_seconds) == pytest.approx(long.seconds["denoise"])
    assert {d.segment for d in long.trace.decisions} == {0, 1, 2}
    one = rendered(bundle, "steps=8")
    assert torch.equal(one.latents, long.latents[:, :, :5])


def test_no_seam_at_the_joins_but_with_segments_that_know_nothing_of_each_other(bundle, long):
    """In place of held frames: other seeds, one after the other."""
    assert jumps(long.frames, [17, 25]) < JUMP
    apart = torch.cat([rendered(bundle, "steps=8", seed=n).latents for n in range(3)], dim=2)
    assert jumps(decode_latents(bundle, apart), [17, 37]) > JUMP
    alone = [decode_latents(bundle, part) for part in apart.chunk(3, dim=2)]
    assert jumps(np.concatenate(alone), [17, 34]) > JUMP


def test_what_is_held_is_as_noisy_as_the_rest():
    noise, known = torch.randn(2, 1, 4, 5, 2, 2)
    inputs = segments.hold(Inputs(noise, None), known, 2)
    assert torch.equal(inputs.hold(noise, 1.0), noise)
    half = inputs.hold(noise, 0.5)
    assert torch.allclose(half[:, :, :2], (known[:, :, -2:] + noise[:, :, :2]) / 2)
    assert torch.equal(half[:, :, 2:], noise[:, :, 2:])
    assert torch.equal(inputs.hold(noise, 0.0)[:, :, :2], known[:, :, -2:])


def test_models_with_a_timestep_per_token_see_it_without_noise():
    """Wan2.2 TI2V: held frames have timestep 0."""
    noise, known = torch.randn(2, 1, 4, 5, 4, 4)
    inputs = segments.hold(Inputs(noise, None, noisy=torch.ones_like(noise)), known, 2)
    model_input, when = inputs.at(noise, torch.tensor(900.0))
    assert torch.equal(model_input[:, :, :2], known[:, :, -2:])
    assert torch.equal(model_input[:, :, 2:], noise[:, :, 2:])
    assert when.tolist() == [[0.0] * 8 + [900.0] * 12]
    assert torch.equal(inputs.known(noise), model_input)


def test_image_to_video_goes_on_from_the_last_picture(monkeypatch):
    """The change at the join is a fraction of that to a segment which starts where the first did."""
    bundle = ditcache.load("tiny_i2v")
    seen = []
    original = segments.last_picture
    monkeypatch.setattr(
        "ditcache.pipeline.render.last_picture", lambda f: seen.append(original(f)) or seen[-1]
    )
    words = ["model=tiny_i2v", "segments=2"]
    video = rendered(bundle, *words, "steps=8", text="a red star moves left on a blue background")
    assert len(video.frames) == settings(*words).total_frames == 2 * 16 + 1
    assert video.latents.shape[2] == 10 and len(seen) == 1
    assert np.array_equal(segments.decode_segments(bundle, video.latents, 2), video.frames)
    assert np.abs(np.asarray(seen[0]) / 255 - video.frames[16]).max() <= 0.51 / 255
    before, after, again = video.frames[16], video.frames[17], video.frames[1]
    assert np.abs(after - before).mean() < 0.4 * np.abs(again - before).mean()


@pytest.mark.parametrize("name", ["wan2.2_t2v", "wan2.2_i2v", "wan2.1_i2v_480p"])
def test_every_family_goes_on(checkpoints, name, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    words = [f"model={name}", f"model.path={checkpoints[name]}", "model.dtype=float32"]
    words += ["model.device=cpu", "height=32", "width=32", "num_frames=9", "steps=3", "segments=2"]
    words += [f"image={tmp_path}/red.png"] if "i2v" in name else []
    s = settings(*words, "cache=interval", "cache/warmstart=reuse", "cache.warmstart.steps=1")
    video = Renderer(ditcache.load(s.model), s, lambda *_: None).render(
        0, "a cat", s.cache, s.pictures[0], seed=0
    )
    assert len(video.frames) == s.total_frames == (17 if "i2v" in name else 13)
    assert video.latents.isfinite().all()
    assert next(d.reason for d in video.trace.decisions if d.segment) == "warm"


REFUSED = {
    "chronoedit": (
        ["model=tiny_chronoedit", "segments=2"],
        "segments: ChronoEdit cannot go on from an earlier segment",
    ),
    "none": (["segments=0"], "segments: must be >= 1, got 0"),
    "one": (["overlap=2"], "overlap: has no effect on one segment; set segments > 1"),
    "image": (["model=tiny_i2v", "segments=2", "overlap=1"], "overlap: WanImageToVideo goes on"),
    "all": (["segments=2", "overlap=5"], "overlap: must be from 1 to 4 latent frames of the 5"),
    "zero": (["segments=2", "overlap=0"], "overlap: must be from 1 to 4 .* got 0"),
    "picture": (["segments=2", "num_frames=1"], "num_frames: a segment needs 5 or more"),
    "warm": (
        ["cache=interval", "cache/warmstart=reuse"],
        r"cache\.warmstart: has no effect on one segment; set segments > 1",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused_in_one_line(why):
    words, message = REFUSED[why]
    with pytest.raises(ConfigError, match=message):
        settings(*words)


def test_overlap_and_frames():
    counts = {overlap: settings("segments=8", f"overlap={overlap}").total_frames for overlap in (1, 2, 4)}  # fmt: skip
    assert counts == {1: 17 + 7 * 16, 2: 17 + 7 * 12, 4: 17 + 7 * 4}
    assert settings("segments=2", "num_frames=9").held == 2


def test_the_command(tmp_path, monkeypatch, read_mp4):
    """Two prompts, a baseline, tiers: one mp4 each, and every record says which segment."""
    monkeypatch.chdir(tmp_path)
    words = ["a red star", "a cat", "segments=2", "steps=4", "cache=interval", "cache.head=2"]
    words += ["cache/warmstart=reuse", "cache.warmstart.steps=1", "compare=true", "upscale=1"]
    words += ["store=tiered", "store.gpu=150KiB", "store.cpu=0", f"hydra.run.dir={tmp_path}/run"]
    assert cli.run(["generate", *words]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["segments"], metrics["frames"]) == (2, 25)
    for number, video in enumerate(metrics["video"]):
        parts = video["segments"]
        assert [part["segment"] for part in parts] == [0, 1]
        assert [part["units_warm"] for part in parts] == [0, 2]
        assert sum(part["units_computed"] for part in parts) == video["compute"]["units_computed"]
        assert sum(p["denoise_s"] for p in parts) == pytest.approx(video["timing"]["denoise_s"])
        assert video["store"]["tiers"]["disk"]["evictions"] == 0
        assert len(read_mp4(tmp_path / "run" / f"video-{number:03d}.mp4", 64, 64)) == 25
    rows = [json.loads(x) for x in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 2 * 4 * 2 and {row["segment"] for row in rows} == {0, 1}
    assert {row["reason"] for row in rows if row["segment"] and not row["step"]} == {"warm"}


def test_segments_change_what_an_uncached_result_is_kept_under():
    from ditcache.ab.runs import Runner

    case = SimpleNamespace(prompt="x", seed=0, picture=None)

    def key(*words):
        return Runner.key(SimpleNamespace(model={}, settings=settings(*words)), case, 24, 0.0)

    keys = [key(), key("segments=2"), key("segments=3"), key("segments=2", "overlap=2")]
    assert all(a != b for n, a in enumerate(keys) for b in keys[:n])
