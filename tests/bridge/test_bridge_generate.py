"""Bridges in whole runs: beside step caches, in two stages, from several files, from Python."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_checkpoints import small_transformer
from torch import nn

import ditcache
from ditcache import cli
from ditcache.bridge.capture import Seen, shape_of
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.generate import start_at
from ditcache.bridge.kv_cache import KVCache, extract_kv_cache, fuse_caches
from ditcache.bridge.projectors.identity import Identity
from ditcache.bridge.projectors.weighted import Weighted
from ditcache.bridge.refuse import check_bundles, check_frames, check_pair
from ditcache.bridge.run import Bridge, Source
from ditcache.bridge.saved import End, Header, save_bridge
from ditcache.errors import DitcacheError
from ditcache.store.device import DeviceStore

HALF = Weighted(learnable_alpha=False, alpha_granularity="global")
TEXTS = {name: torch.randn(1, 512, 64) for name in ("cond", "uncond")}


def model(cls="WanTransformer3DModel", seed=0, channels=36):
    torch.manual_seed(seed)
    return small_transformer(cls, channels, 16).eval().requires_grad_(False)


@torch.no_grad()
def denoised(target, bridge, steps=6):
    """Velocities of a run whose steps a cache is told of."""
    image, found = torch.ones(1, 5, 16), []
    x = torch.randn(1, 36, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    with bridge.attached(TEXTS):
        for index in range(steps):
            sigma = 1 - index / steps
            for branch in TEXTS:
                where = {"step_index": index, "num_inference_steps": steps, "sigma": sigma}
                with target.cache_context(branch, **where):
                    seen = Seen(0.9**index * x, torch.tensor([1000 * sigma]), TEXTS[branch], image)
                    found.append(seen.call(target))
    target._reset_stateful_cache()
    return found


def half_bridge(target, source, **settings):
    net = HALF.make(shape_of(source), shape_of(target))
    fusion = Fusion(fusion_direction="chrono_to_wan", **settings)
    given = Source(source, net, TEXTS, torch.ones(1, 5, 16))
    return Bridge(target, {"chrono": given}, fusion, DeviceStore())


@pytest.mark.parametrize("driver", ["stream", "store"])
def test_a_skipped_target_step_asks_no_source(driver):
    target, source = model(seed=1), model("ChronoEditTransformer3DModel", 2)
    bridge = half_bridge(target, source, driver=driver)
    cache = ditcache.enable_cache(target, "interval", every=2, head=1, tail=0)
    denoised(target, bridge)
    computed = {(d.step, d.branch) for d in cache.trace.decisions if d.computed}
    ditcache.disable_cache(target)
    assert {(step, branch) for step, _, branch in bridge.asked} == computed
    assert len(bridge.asked) == len(computed) == 6  # steps 0, 2, 4, both branches


def test_a_cache_that_skips_nothing_leaves_the_bridge_as_it_is():
    target, source = model(seed=1), model("ChronoEditTransformer3DModel", 2)
    plain = denoised(target, half_bridge(target, source))
    ditcache.enable_cache(target, "interval", every=1, head=1)
    cached = denoised(target, half_bridge(target, source))
    ditcache.disable_cache(target)
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))


def test_refreshes_align_with_the_steps_the_cache_computes():
    target, source = model(seed=1), model("ChronoEditTransformer3DModel", 2)
    bridge = half_bridge(target, source, refresh_every=3)
    ditcache.enable_cache(target, "interval", every=2, head=1, tail=0)
    denoised(target, bridge)
    ditcache.disable_cache(target)
    # Due from step 3 on, but the target computes again at 4.
    assert [step for step, _, branch in bridge.asked if branch == "cond"] == [0, 4]


def test_kv_caches_are_extracted_fused_and_converted():
    target, source = model(seed=1), model("ChronoEditTransformer3DModel", 2)
    latents, timestep = torch.randn(1, 36, 8, 4, 4), torch.tensor([500.0])
    image = torch.ones(1, 5, 16)
    own = extract_kv_cache(target, latents, timestep, TEXTS["cond"], image)
    other = extract_kv_cache(source, latents, timestep, TEXTS["cond"], image)
    assert len(own) == 3 and own.keys[0].shape == (1, 2, 32, 24)
    shape = shape_of(target)
    fused = fuse_caches(own, [(Identity().make(shape, shape), other)], timestep)
    assert all(torch.equal(a, b) for a, b in zip(fused.keys, other.keys, strict=True))
    half = fuse_caches(own, {"s": (HALF.make(shape, shape), other)}, timestep)
    torch.testing.assert_close(half.values[1], (own.values[1] + other.values[1]) / 2)
    dynamic = other.to_dynamic_cache()
    assert dynamic.get_seq_length() == 32
    back = KVCache.from_dynamic_cache(dynamic)
    assert all(torch.equal(a, b) for a, b in zip(back.values, other.values, strict=True))
    with pytest.raises(ValueError, match="3 layers and 2"):
        KVCache(own.keys, own.values[:2])


def bundle_of(transformer, **vae):
    config = {"z_dim": 16, "latents_mean": [0.0], **vae}
    pipe = SimpleNamespace(transformer=transformer, vae=SimpleNamespace(config=config), config={})
    return SimpleNamespace(
        pipe=pipe, model=SimpleNamespace(path="here"), experts={"transformer": transformer}
    )


def test_pairs_that_cannot_be_bridged_say_why():
    wan, chrono = model(seed=1), model("ChronoEditTransformer3DModel", 2)
    check_pair(wan, chrono)

    class QwenImageTransformer2DModel(nn.Module):
        config = {"in_channels": 64}  # noqa: RUF012

    with pytest.raises(DitcacheError, match="Qwen-Image runs one joint stream"):
        check_pair(wan, QwenImageTransformer2DModel())
    with pytest.raises(DitcacheError, match="take other inputs \\(in_channels 16 and 36\\)"):
        check_pair(wan, model(channels=16))
    with pytest.raises(DitcacheError, match=r"different VAEs \(latents_mean\)"):
        check_bundles(bundle_of(wan), bundle_of(chrono, latents_mean=[0.5]))
    two = bundle_of(wan)
    two.experts = {"transformer": wan, "transformer_2": wan}
    with pytest.raises(DitcacheError, match="has two experts"):
        check_bundles(two, bundle_of(chrono))
    fusion = Fusion(fusion_direction="chrono_to_wan")
    check_frames(8, fusion, wan, chrono)
    check_frames(21, fusion, wan)
    with pytest.raises(DitcacheError, match="trained on 2 or 8 latent frames and would see 21"):
        check_frames(21, fusion, wan, chrono)
    allowed = Fusion(fusion_direction="chrono_to_wan", allow_out_of_range=True)
    check_frames(21, allowed, wan, chrono)


def test_where_the_second_stage_starts():
    sigmas = [1.0, 0.8, 0.5, 0.2, 0.0]
    assert start_at(sigmas, 0.8) == (1, 0.8) and start_at(sigmas, 0.6) == (2, 0.5)
    with pytest.raises(DitcacheError, match=r"bridge\.draft_sigma: 0\.1 lies below"):
        start_at(sigmas, 0.1)


I2V = ["generate", "model=tiny_i2v", "num_frames=29", "steps=2"]
WRONG = [
    (["+bridge=nothing.safetensors"], "bridge.path: no file 'nothing.safetensors'"),
    (["+bridge=zoo:nothing"], "bridge.path: there is no 'zoo:nothing'. One of: zoo:"),
    (["+bridge=untrained", "num_frames=17"], "num_frames: 17 is 5 latent frames"),
    (["+bridge=untrained", "bridge.projector.learnable_alpha=true"], "a learned alpha starts at 0"),
    (["+bridge=untrained", "bridge.draft_steps=2"], "need draft_steps and draft_sigma"),
    (["+bridge=untrained", "bridge.target_model=chrono"], "bridge.target_model: is chrono"),
    (["+bridge=untrained", "bridge.target_model=crono"], "Did you mean 'chrono'?"),
    (["+bridge=untrained", "bridge.fusion.fusion_direction=wan_to_chrono"], "has nothing for a wan"),
    (["+bridge=untrained", "bridge.fusion.refresh_drop=0.1"], "set either it or refresh_every"),
    (["+bridge=untrained", "bridge.fusion.window=[1,0]"], "bridge.fusion.window: must be [low, high]"),
    (["+bridge=untrained", "guidance=1", "bridge.fusion.branches=cond"], "one branch"),
    (["+bridge=untrained", "bridge.fusion.driver=streams"], "Did you mean 'stream'?"),
    (["+bridge=two_stage", "bridge.path=zoo:chrono_to_wan", "cache=taylorseer"], "do not go with a step cache"),
    (["+bridge=saved", "bridge.path=zoo:wan_to_chrono"], "has a projector into chrono, but model="),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_bridges_are_one_line(arguments, message, tmp_path, capsys):
    assert cli.run([*I2V, *arguments, f"hydra.run.dir={tmp_path}/run"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and message in said[0], said
    assert not (tmp_path / "run").exists()


def rendered(tmp_path, name, *arguments):
    from safetensors.torch import load_file

    folder = tmp_path / name
    arguments = [*I2V, "save_latents=true", *arguments, f"hydra.run.dir={folder}"]
    assert cli.run(arguments) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    return load_file(folder / "latents-000.safetensors")["latents"], metrics["video"][0]


def test_generate_with_bridges(tmp_path):
    """The driver and the order of several files do not matter; the source is counted."""
    shipped = "zoo:chrono_to_wan"
    plain, _ = rendered(tmp_path, "plain")
    bridged, told = rendered(tmp_path, "stream", f"+bridge={shipped}")
    stored, other = rendered(
        tmp_path, "store", f"+bridge={shipped}", "bridge.fusion.driver=store", "store=tiered"
    )
    assert torch.equal(bridged, stored) and not torch.equal(bridged, plain)
    assert told["bridge"]["source_forwards"] == told["bridge"]["target_forwards"] == 4
    assert told["bridge"]["cost"] == other["bridge"]["cost"] == 2.0
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(
        (cli.Path(ditcache.__file__).parent / "zoo/bridges/chrono_to_wan.safetensors").read_bytes()
    )
    both = [
        rendered(tmp_path, f"both-{i}", "+bridge=saved", f"bridge.path=[{','.join(pair)}]")[0]
        for i, pair in enumerate(([shipped, str(twin)], [str(twin), shipped]))
    ]  # fmt: skip
    assert torch.equal(*both) and not torch.equal(both[0], bridged)


def test_two_stages(tmp_path):
    draft = ["+bridge=two_stage", "bridge.path=zoo:chrono_to_wan", "bridge.draft_steps=2"]
    _, told = rendered(tmp_path, "two", *draft, "bridge.draft_sigma=0.8", "steps=4")
    started = told["bridge"]["target_forwards"]
    assert 2 <= started < 8 and told["bridge"]["source_forwards"] == started
    assert told["bridge"]["draft_forwards"] == 4
    assert told["bridge"]["cost"] == 2 + 4 / started
    assert told["bridge"]["source_blocks"] == 8 * (started + 4)


@pytest.fixture(scope="module")
def facade():
    return ditcache.WanChronoEditBridge(projector_hidden_dim=4, refresh_every=2)


def test_the_facade_is_closed_until_trained_and_saves_and_loads(facade, tmp_path):
    prompt, settings = "it becomes yellow", {"steps": 2, "guidance": 1.0}
    untrained = facade.generate_with_fusion(prompt, **settings)
    assert untrained.shape == (29, 64, 64, 3) and facade.last.forwards == 1
    assert set(facade.nets) == {"wan", "chrono"}
    path = tmp_path / "bridge.safetensors"
    with torch.no_grad():
        for parameter in facade.nets["wan"].parameters():
            parameter.normal_(0, 0.2)
    opened = facade.generate_with_fusion(prompt, **settings)
    assert not np.array_equal(opened, untrained)
    facade.save_projectors(path)
    facade.nets["wan"] = facade.projector.make(*(shape_of(facade.transformer("wan")),) * 2)
    assert np.array_equal(facade.generate_with_fusion(prompt, **settings), untrained)
    facade.load_projectors(path)
    assert np.array_equal(facade.generate_with_fusion(prompt, **settings), opened)


def test_the_facade_refuses_files_of_other_models(facade, tmp_path):
    wan, chrono = model(seed=1), model("ChronoEditTransformer3DModel", 2)
    ends = {
        side: End(side, side, "0" * 16, shape_of(x))
        for side, x in (("wan", wan), ("chrono", chrono))
    }
    shape = shape_of(wan)
    path, nets = tmp_path / "b.safetensors", {way: HALF.make(shape, shape) for way in ends}
    save_bridge(path, Header(ends, ("wan", "chrono"), HALF, 1), nets)
    with pytest.raises(DitcacheError, match="these weights are others"):
        facade.load_projectors(path)
    with pytest.raises(DitcacheError, match=r"no 'gate'\. Did you mean 'gate_"):
        ditcache.WanChronoEditBridge(gate="head")


def test_the_condition_is_the_pipelines_own():
    from PIL import Image

    from ditcache.bridge.encode import condition_of, encode_frames
    from ditcache.clips.edits import draw_clip
    from ditcache.pipeline.inputs import draw_inputs
    from ditcache.pipeline.text import TextStates

    bundle = ditcache.load("tiny_i2v")
    clip = draw_clip("composite", np.random.default_rng(0))
    text, picture = TextStates(torch.zeros(0), None), Image.fromarray(clip.frames[0])
    size = {"height": 64, "width": 64, "num_frames": 29, "seed": 0}
    with torch.no_grad():
        own = condition_of(bundle, clip.frames[0], 29)
        theirs = draw_inputs(bundle, text, picture=picture, **size).condition
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-4)
        latents = encode_frames(bundle, clip.frames)
    assert latents.shape == (1, 16, 8, 8, 8) and 0.5 < float(latents.std()) < 1.5


def test_composite_clips_move_and_change():
    from ditcache.clips import judge
    from ditcache.clips.edits import draw_clip

    for seed in range(6):
        clip = draw_clip("composite", np.random.default_rng(seed))
        assert clip.frames.shape == (29, 64, 64, 3)
        assert clip.scene.direction in clip.scene.caption and "becomes" in clip.scene.caption
        last = judge.judge(np.repeat(clip.frames[-1:], 3, 0) / 255)
        moved = judge.read_direction(
            np.abs(clip.frames / 255 - np.median(clip.frames / 255, 0)).max(-1)
        )
        assert last.shape == clip.scene.shape and last.colour == clip.scene.colour, seed
        assert moved in (clip.scene.direction, "none")
