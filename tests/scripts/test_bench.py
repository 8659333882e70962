"""The benchmarks: arms go on and come off without a trace, everyone's blocks are counted alike, and
methods meet at equal compute.
"""

import json
import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import bench_gpu
import bench_overhead
import bench_policies
import bench_static
import numpy as np
import pytest
import torch
from bench import cache_dit_arm, masks, matched, methods, table
from bench.arms import Arm
from bench.measure import Bench, compared

import ditcache
from ditcache.errors import ConfigError
from ditcache.pipeline.denoise import decode_latents

STEPS = 6
NONE = Arm("control", "none")
RATIOS = [1.0, *[0.99] * (STEPS - 1)]
PEERS = {
    "first block": Arm("diffusers", "", {"config": "FirstBlockCacheConfig", "threshold": 0.5}),
    "magcache": Arm(
        "diffusers",
        "",
        {"config": "MagCacheConfig", "num_inference_steps": STEPS, "mag_ratios": RATIOS},
    ),
    "seacache": Arm("diffusers", "", {"config": "SeaCacheConfig", "threshold": 2.0}),
    "taylorseer lite": Arm(
        "diffusers",
        "",
        {
            "config": "TaylorSeerCacheConfig",
            "cache_interval": 3,
            "disable_cache_before_step": 2,
            "use_lite_mode": True,
        },
    ),
    "taylorseer thirds": Arm(
        "diffusers",
        "",
        {
            "config": "TaylorSeerCacheConfig",
            "cache_interval": 3,
            "disable_cache_before_step": 2,
            "cache_identifiers": methods.PARTS,
        },
    ),
    "dbcache": Arm("cache-dit", "", {"Fn": 1, "warmup": 2, "threshold": 0.5, "steps": STEPS}),
    "dbcache taylorseer": Arm(
        "cache-dit",
        "",
        {"Fn": 2, "warmup": 2, "threshold": 0.5, "steps": STEPS, "calibrator": "taylorseer1"},
    ),
    "static mask": Arm("cache-dit", "", {"Fn": 1, "mask": "101101", "mask_policy": "static"}),
}


@pytest.fixture(scope="module")
def bench(bundle):
    bench = Bench(bundle, STEPS)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def inputs(bench):
    return bench.inputs("a red circle moving left", 3)


@pytest.fixture(scope="module")
def uncached(bench, inputs):
    return bench.run(NONE, inputs).latents


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_goes_on_and_comes_off(bench, inputs, uncached, name):
    arm = PEERS[name]
    if arm.who == "cache-dit":
        pytest.importorskip("cache_dit")
    before = set(vars(bench.transformer))
    first, again = bench.run(arm, inputs), bench.run(arm, inputs, watch=True)
    assert 0 < first.blocks < bench.all_blocks and 1 <= first.steps < STEPS
    assert not torch.equal(first.latents, uncached)
    assert torch.equal(first.latents, again.latents), "something is left of the first video"
    assert again.kept > 0 and first.kept is None
    assert torch.equal(bench.run(NONE, inputs).latents, uncached)
    left = set(vars(bench.transformer)) - before - {"forward", "_diffusers_hook", "_cache_config"}
    assert not left and not bench.transformer.is_cache_enabled


@pytest.fixture(scope="module")
def two():
    """The embedded model with two experts."""
    bench = Bench(ditcache.load("tiny_wan2.2"), STEPS)
    yield bench
    bench.close()


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_goes_onto_both_experts_and_comes_off(two, name):
    arm = PEERS[name]
    if arm.who == "cache-dit":
        pytest.importorskip("cache_dit")
    assert two.spans == [range(2), range(2, STEPS)]
    inputs = two.inputs("a red circle moving left", 3)
    plain = two.run(NONE, inputs)
    assert (plain.blocks, plain.steps) == (8 * 2 * STEPS, STEPS)
    first, again = two.run(arm, inputs), two.run(arm, inputs, watch=True)
    assert torch.equal(first.latents, again.latents), "something is left of the first video"
    assert 0 < first.blocks < two.all_blocks and 2 <= first.steps < STEPS
    assert torch.equal(two.run(NONE, inputs).latents, plain.latents)
    assert not any(expert.is_cache_enabled for expert in two.bundle.experts.values())


def test_settings_of_their_own_and_known_counts_on_two_experts(two):
    inputs = two.inputs("a red circle moving left", 3)
    settings = {"policy": "interval", "every": 2, "head": 1, "low": {"every": 4}}
    assert two.run(Arm("ditcache", "", settings), inputs).steps == 4  # 0, 2; and 2, 4, 5
    for method in methods.methods(two.spans):
        if method.computed is None or method.name in ("planned", "scm"):
            continue  # scm's lengths start anew with each expert
        if method.who == "cache-dit":
            pytest.importorskip("cache_dit")
        for settings in method.ready[:: max(1, len(method.ready) // 2)]:
            video = two.run(method.arm(settings), inputs)
            assert video.steps == method.computed(settings), method.arm(settings).name


def test_the_uncached_loop_counts_every_block(bench, inputs):
    video = bench.run(NONE, inputs)
    assert (video.blocks, video.steps) == (8 * 2 * STEPS, STEPS) and bench.counter.calls == 12


def test_an_intervals_blocks_are_counted(bench, inputs):
    arm = Arm("ditcache", "", {"policy": "interval", "every": 2, "head": 1, "tail": 1})
    video = bench.run(arm, inputs)  # computes 0, 2, 4 and the last, 5
    assert (video.blocks, video.steps) == (8 * 2 * 4, 4)


def test_a_probes_blocks_count_on_every_step(bench, inputs):
    pytest.importorskip("cache_dit")
    video = bench.run(PEERS["static mask"], inputs)
    assert (video.blocks, video.steps) == (2 * (4 * 8 + 2 * 1), 4)


def test_thirds_of_blocks_are_counted(bench, inputs):
    thirds, lite = (
        bench.run(PEERS[name], inputs) for name in ("taylorseer thirds", "taylorseer lite")
    )
    assert thirds.steps == lite.steps and thirds.blocks == lite.blocks
    only_ffn = {**PEERS["taylorseer thirds"].settings, "cache_identifiers": [r"blocks\.\d+\.ffn"]}
    video = bench.run(Arm("diffusers", "", only_ffn), inputs)
    assert thirds.blocks < video.blocks < bench.all_blocks and video.steps == thirds.steps


def test_frames_are_the_packages(bench, bundle, inputs):
    video = bench.run(NONE, inputs)
    frames = bench.frames([video] * 5)
    expected = decode_latents(bundle, video.latents)
    assert all(np.abs(one - expected).max() < 1e-4 for one in frames) and len(frames) == 5


def test_fewer_steps_and_moved_noise_are_controls(bench, inputs, uncached):
    half = bench.run(Arm("control", "", {"steps": STEPS // 2}), inputs)
    assert (half.blocks, half.steps) == (bench.all_blocks / 2, STEPS / 2)
    moved = bench.run(Arm("control", "", {"moved": 1e-4}), inputs).latents
    assert 0 < (moved - uncached).abs().max() < 0.1


def test_our_wrong_setting_is_an_error_and_leaves_nothing(bench, inputs, uncached):
    with pytest.raises(ConfigError):
        bench.run(Arm("ditcache", "", {"policy": "fbcache", "every": 2}), inputs)
    assert torch.equal(bench.run(NONE, inputs).latents, uncached)


def test_cache_dit_is_exact_when_nothing_is_skipped(bench, inputs, uncached):
    pytest.importorskip("cache_dit")
    arm = Arm("cache-dit", "", {"Fn": 1, "warmup": 0, "threshold": 0.0, "steps": STEPS})
    video = bench.run(arm, inputs)
    assert torch.equal(video.latents, uncached) and video.blocks == bench.all_blocks


def test_cache_dit_on_the_pipeline_says_the_same(bench, bundle, inputs, uncached):
    """Our way of attaching it costs it nothing: its own way gives the same latents, video for
    video, and none of it stays behind.
    """
    cache_dit, pipe = pytest.importorskip("cache_dit"), bundle.pipe
    arm = PEERS["dbcache"]
    expected = bench.run(arm, inputs).latents
    call, prompt = type(pipe).__call__, "a red circle moving left"

    def generate():
        return pipe(
            prompt,
            negative_prompt="",
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            latents=inputs.latents,
            output_type="latent",
        ).frames

    assert torch.equal(generate(), uncached)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache_dit.enable_cache(pipe, cache_config=cache_dit_arm.config_of(arm.settings))
        try:
            assert torch.equal(generate(), expected)
            assert torch.equal(generate(), expected)  # a call starts afresh
        finally:
            cache_dit.disable_cache(pipe)
            cache_dit_arm.restore(bench.transformer, None)
    assert type(pipe).__call__ is call and "_is_cached" not in vars(type(pipe))
    assert torch.equal(bench.run(NONE, inputs).latents, uncached)


def test_an_arm_can_be_written_down():
    for method in methods.methods([range(24)]):
        for settings in [*method.open, *method.ready]:
            assert json.loads(json.dumps(settings)) == settings
    arm = Arm("ditcache", "scm", {"policy": "scm", "preset": None, "compute": [2, 1], "skip": [3]})
    assert arm.name == "scm compute=##...#"


def test_masks_have_the_steps_they_are_asked_for():
    for count in range(4, 24):
        found = masks.placements(count, 24)
        assert found and all(sum(mask) == count and mask[0] == mask[-1] == 1 for mask in found)
    assert masks.front(4, 6, 9) == [1, 1, 1, 1, 0, 1, 0, 0, 1]
    assert masks.run_lengths([1, 1, 0, 1, 0, 0, 1]) == ([2, 1, 1], [1, 2])


def test_step_counts_are_known_without_a_run(bench, inputs):
    """For a few settings of every method that claims to know them."""
    for method in methods.methods([range(STEPS)]):
        if method.computed is None or method.name == "planned":
            continue
        if method.who == "cache-dit":
            pytest.importorskip("cache_dit")
        for settings in method.ready[:: max(1, len(method.ready) // 2)]:
            video = bench.run(method.arm(settings), inputs)
            count = method.computed(settings)
            blocks = 2 * (8 * count + method.probe * (STEPS - count))
            assert (video.steps, video.blocks) == (count, blocks), method.arm(settings).name


def test_the_matched_rule():
    """As near as possible from either side, never much below."""
    assert matched.nearest([1.5, 1.9, 2.2, 2.5], 2.0) == [2]
    assert matched.nearest([1.95, 2.2], 2.0) == [0]
    assert matched.nearest([1.9, 2.1, 2.1], 2.0) == [1, 2]
    assert matched.nearest([1.0, 1.9], 2.0) == []
    assert matched.allowed(2.909, 3.0) and not matched.allowed(2.88, 3.0)


def test_a_threshold_is_found():
    asked = []

    def ratio_at(value):
        asked.append(value)
        return 1 + math.floor(12 * min(value, 1.0)) / 6  # rises in steps, to 3

    known = {}
    matched.turn(ratio_at, known, 2.0)
    assert min(abs(ratio - 2.0) for ratio in known.values()) < 0.03 and len(asked) <= 8
    count = len(asked)
    matched.turn(ratio_at, known, 2.0)
    assert len(asked) == count, "asked again"


def test_methods_meet_at_equal_compute(bench, inputs):
    tuner = matched.Tuner(bench, [inputs])
    steps = lambda s: methods.interval_steps(s, STEPS)  # noqa: E731
    grid = [{"policy": "taylorseer", "head": h, "every": e} for h in (1, 2) for e in (2, 3)]
    fixed = methods.Method("ditcache", "taylorseer", ready=grid, computed=steps, alike=True)
    turned = methods.Method("ditcache", "fbcache", open=[{"policy": "fbcache"}], probe=1)
    for method in (fixed, turned):
        arm = tuner.best(method, 1.5, "blocks")[-1]
        ratio = bench.all_blocks / bench.run(arm, inputs).blocks
        assert matched.allowed(ratio, 1.5) and ratio < 2.0
    assert {row["method"] for row in tuner.log} == {"taylorseer", "fbcache"}
    assert tuner.best(fixed, 5.0, "blocks") == []
    wrong = methods.Method("ditcache", "wrong", open=[{"policy": "fbcache", "every": 3}])
    assert tuner.best(wrong, 1.5, "blocks") == [] and tuner.refused


def test_rows_and_differences():
    frames = np.random.default_rng(0).random((2, 16, 16, 3))
    videos = [
        {**compared(frames, frames * s), "seconds": 1.0, "blocks": 48.0, "steps": 3, "speedup": 1.8}
        for s in (0.9, 0.8)
    ]
    row = table.summary(videos, 96, 2048)
    assert row["compute"] == 2.0 and row["bound"] == pytest.approx(0.9)
    assert row["psnr_low"] <= row["psnr"] <= row["psnr_high"] and row["worst_frame"] < row["psnr"]
    assert "2.00x" in table.markdown([(NONE, row)]) and "2 KiB" in table.markdown([(NONE, row)])
    assert table.difference([3.0, 5.0], [1.0, 3.0]) == (2.0, 2.0, 2.0)


def test_policies_end_to_end(bundle, tmp_path, monkeypatch, capsys):
    arms = [
        Arm("ditcache", "taylorseer", {"policy": "taylorseer", "head": 2}),
        Arm("ditcache", "fbcache", {"policy": "fbcache", "every": 2}),  # refused
        Arm("diffusers", "SeaCache", {"config": "SeaCacheConfig", "threshold": 2.0}),
    ]
    ready = [{"policy": "interval", "head": 1, "every": every} for every in (2, 3)]
    every = [m for m in methods.methods([range(STEPS)]) if m.name == "FirstBlockCache"]
    every.append(methods.Method("ditcache", "interval", ready=ready, alike=True))
    monkeypatch.setattr("ditcache.load", lambda name: bundle)
    monkeypatch.setattr(bench_policies, "STEPS", STEPS)
    monkeypatch.setattr(bench_policies, "TARGETS", (1.5,))
    monkeypatch.setattr(methods, "defaults", lambda steps: arms)
    monkeypatch.setattr(methods, "methods", lambda spans: every)
    monkeypatch.setattr(methods, "controls", lambda: [Arm("control", "4 steps", {"steps": 4})])
    arguments = ["--limit", "1", "--tune", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench_policies.py", *arguments])
    bench_policies.main()
    text = capsys.readouterr().out
    assert text.count("| control | `4 steps` |") == 3
    for words in ("As shipped", "1.5x less blocks", "4 of 6 steps", "paired by caption", "Not run"):
        assert words in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["arms"]) >= 5 and all(len(arm["videos"]) == 1 for arm in results["arms"])
    assert results["tuning"] and len(results["captions"]) == 1
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    assert (tmp_path / "table.md").read_text().strip() == text.strip()


def test_static_policies_meet_at_equal_steps(bundle, monkeypatch, capsys):
    planned = methods.Method(
        "ditcache",
        "planned",
        ready=[{"policy": "planned", "compute": count} for count in (7, 8)],
        computed=lambda settings: settings["compute"],
        alike=True,
    )
    poor = [{"policy": "interval", "head": 1, "every": every} for every in (3, 4, 5)]
    interval = methods.Method(
        "ditcache",
        "interval",
        ready=poor,
        computed=lambda settings: methods.interval_steps(settings, 24),
        alike=True,
    )
    both = [planned, interval]
    monkeypatch.setattr("ditcache.load", lambda name: bundle)
    monkeypatch.setattr(methods, "ours", lambda spans: both)
    monkeypatch.setattr(
        "sys.argv", ["bench_static.py", "--budgets", "7", "--limit", "1", "--tune", "1"]
    )
    bench_static.main()
    text = capsys.readouterr().out
    assert "| 7 |" in text and "`interval head=1 every=4`" in text
    both[0] = replace(interval, name="planned", ready=poor)
    both[1] = replace(planned, name="other")
    with pytest.raises(SystemExit, match=r"not the best at \[7\]"):
        bench_static.main()


def test_held_out_captions_are_not_tuned_on():
    prompts, tuning = bench_policies.captions("held-out", 6)
    assert len(prompts) == 40 and len(tuning) == 6 and not set(prompts) & set(tuning)
    assert bench_policies.captions("held-out", 6) == (prompts, tuning)


def test_overhead_is_measured(bundle, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("ditcache.load", lambda name: bundle)
    counts = ["--calls", "4", "--slow-calls", "2", "--slow-ms", "2"]
    monkeypatch.setattr("sys.argv", ["bench_overhead.py", *counts])
    bench_overhead.main()
    text = capsys.readouterr().out
    names = [name for name, arm in bench_overhead.ARMS.items() if bench_overhead.present(arm)]
    assert all(f"| {name} |" in text for name in names) and "% |" in text


def test_the_gpu_benchmark_runs_on_a_toy_shape(monkeypatch, capsys):
    arguments = ["--device", "cpu", "--tiny", "--steps", "4", "--rounds", "1"]
    monkeypatch.setattr("sys.argv", ["bench_gpu.py", *arguments])
    bench_gpu.main()
    text = capsys.readouterr().out
    assert all(f"| `{name}` |" in text for name in bench_gpu.ARMS) and "| 2.00x |" in text


def test_the_gpu_benchmark_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        bench_gpu.main()


def test_state_is_measured_once_per_storage():
    from bench.state import bytes_of

    tensor = torch.zeros(10)
    holder = SimpleNamespace(
        a=tensor, b=[tensor[:5]], c={"x": torch.zeros(3)}, d=torch.nn.Linear(9, 9)
    )
    assert bytes_of(holder) == 52 and bytes_of({}) == 0
