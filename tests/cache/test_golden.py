"""Masks that follow from published constants, and cache-dit's SCM presets, digit for digit."""

from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from by_hand import by_hand, decisions
from diffusers import UniPCMultistepScheduler
from diffusers.models.transformers.transformer_wan import WanTimeTextImageEmbedding
from test_exactness import generate

import ditcache
from ditcache.cache.policies.base import Schedule
from ditcache.cache.policies.magcache import MagCache, resampled
from ditcache.cache.policies.scm import PRESETS, SCM
from ditcache.cache.policies.teacache import TeaCache
from ditcache.cache.schedule import schedule_reader, span_of
from ditcache.errors import ConfigError

# model, threshold, K, retention of each expert, mask of the cond branch (1 computes)
GOLDEN = [
    ("wan2.1-t2v-1.3b", 0.12, 2, [0.2], "11111111110010010010010010010010010010010010101011"),
    ("wan2.1-t2v-1.3b", 0.12, 4, [0.2], "11111111110000100001000010000100001000100100101011"),
    ("wan2.1-t2v-14b", 0.24, 6, [0.2], "11111111110000001000000100000010000010000100100101"),
    ("wan2.1-i2v-14b-480p", 0.24, 6, [0.2], "1111111100000010000010000100001000100101"),
    ("wan2.1-i2v-14b-720p", 0.24, 6, [0.2], "1111111100000010000001000001000010010010"),
    ("wan2.2-ti2v-5b-t2v", 0.06, 2, [0.2], "11111111110010010010010010010010010010101010101010"),
    ("wan2.2-ti2v-5b-i2v", 0.06, 2, [0.2], "11111111110010010010010010010010010010101010101110"),
    ("wan2.2-t2v-a14b", 0.06, 2, [0.4, 0.4], "1111111111001001001001001011111101010111"),
    ("wan2.2-i2v-a14b", 0.06, 2, [1.0, 0.1], "1111111111111111110010010010101010111111"),
]  # fmt: skip
EXPERTS = {"wan2.2-t2v-a14b": (12.0, 0.875, 26), "wan2.2-i2v-a14b": (5.0, 0.9, 15)}


def digits(mask):
    return "".join(str(int(computed)) for computed in mask)


def wan_scheduler(steps, shift):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    return scheduler


def spans(model, steps):
    """First step and end of each expert, with the model's own shift and boundary."""
    if model not in EXPERTS:
        return [(0, steps)]
    shift, boundary, _ = EXPERTS[model]
    scheduler = wan_scheduler(steps, shift)
    pipe = SimpleNamespace(
        scheduler=scheduler,
        transformer=True,
        transformer_2=True,
        config=SimpleNamespace(boundary_ratio=boundary),
    )
    return [span_of(pipe, name, scheduler.timesteps) for name in ("transformer", "transformer_2")]


@pytest.mark.parametrize(("model", "setting"), EXPERTS.items())
def test_high_noise_steps_of_the_two_experts(model, setting):
    assert spans(model, 40) == [(0, setting[2]), (setting[2], 40)]


@pytest.mark.parametrize(("model", "threshold", "run", "retention", "mask"), GOLDEN)
def test_magcache_gives_the_published_mask(model, threshold, run, retention, mask):
    found = ""
    for (first, end), share in zip(spans(model, len(mask)), retention, strict=True):
        policy = MagCache(threshold=threshold, max_run=run, retention=share).fitted(model)
        found += digits(policy.mask(Schedule(len(mask), first=first, end=end)))[first:end]
    assert found == mask


def test_magcache_counterpart_must_fail():
    """The masks hang on the numbers: a step less in a row gives another one."""
    for model, threshold, run, retention, mask in GOLDEN[:7]:
        policy = MagCache(threshold=threshold, max_run=run - 1, retention=retention[0])
        assert digits(policy.fitted(model).mask(Schedule(len(mask)))) != mask


@pytest.mark.parametrize("steps", [2, 4, 25, 30, 50, 100])
def test_magcache_resamples_to_the_nearest_step(steps):
    """The first and the last stay, and none is further off than half a step."""
    found = resampled([float(step) for step in range(50)], steps)
    assert len(found) == steps and (found[0], found[-1]) == (0, 49)
    assert all(abs(at - step * 49 / (steps - 1)) <= 0.5 for step, at in enumerate(found))


# TeaCache: model and signal, threshold, guards, scheduler and polynomial as its authors use them
TEACACHE = [
    ("wan2.1-t2v-1.3b", "e0", (0.05, 0.1), (5, 0), (50, 5.0)),
    ("wan2.1-t2v-14b", "e0", (0.1, 0.2), (5, 0), (50, 5.0)),
    ("wan2.1-i2v-14b-480p", "e0", (0.2, 0.3), (5, 0), (40, 3.0)),
    ("wan2.1-i2v-14b-720p", "e0", (0.2, 0.3), (5, 0), (40, 5.0)),
    ("wan2.1-t2v-1.3b", "e", (0.05, 0.07, 0.08), (1, 1), (50, 5.0)),
    ("wan2.1-i2v-14b-480p", "e", (0.13, 0.19), (1, 1), (40, 3.0)),
    ("wan2.2-ti2v-5b-t2v", "e", (0.26,), (1, 1), (50, 5.0)),
]


@pytest.fixture(scope="module")
def embedder():
    """A small Wan time embedder whose output changes from step to step about as a trained one's."""
    torch.manual_seed(0)
    embedder = WanTimeTextImageEmbedding(64, 256, 6 * 64, 32)
    with torch.no_grad():
        embedder.time_embedder.linear_2.bias.normal_(std=2.0)
        embedder.time_proj.bias.normal_(std=2.0)
    return embedder


def signals(embedder, timesteps):
    """The time embeddings as a run sees them, one forward a step."""
    text, found = torch.zeros(1, 1, 32), {"e": [], "e0": []}
    with torch.no_grad():
        for timestep in timesteps:
            e, e0 = embedder(timestep[None], text)[:2]
            found["e"].append(e)
            found["e0"].append(e0)
    return found


def simulated(values, coefficients, threshold, head, tail):
    """The reference's section 3.1 in a few lines -> mask, distance of any sum to the threshold."""
    mask, total, margin = "1", 0.0, 9.0
    for step in range(1, len(values)):
        before, now = values[step - 1], values[step]
        change = ((now - before).abs().mean() / before.abs().mean()).item()
        if step < head or step >= len(values) - tail:
            mask, total = mask + "1", 0.0
            continue
        power = len(coefficients) - 1
        total += sum(c * change ** (power - i) for i, c in enumerate(coefficients))
        margin = min(margin, abs(total - threshold))
        mask += "0" if total < threshold else "1"
        total = total if total < threshold else 0.0
    return mask, margin


@pytest.mark.parametrize(("model", "signal", "thresholds", "guards", "sampling"), TEACACHE)
def test_teacache_computes_the_steps_of_a_simulation(
    embedder, model, signal, thresholds, guards, sampling
):
    scheduler, (head, tail) = wan_scheduler(*sampling), guards
    pipe = SimpleNamespace(
        scheduler=scheduler, transformer=SimpleNamespace(condition_embedder=embedder)
    )
    schedule = schedule_reader(pipe)("transformer", sampling[0])
    schedule = Schedule(sampling[0], head=head, tail=tail, embed=schedule.embed)
    for threshold in thresholds:
        policy = TeaCache(rel_l1_thresh=threshold, signal=signal).fitted(model)
        values = signals(embedder, scheduler.timesteps)[signal]
        mask, margin = simulated(values, policy.coefficients, threshold, head, tail)
        assert margin > 1e-4  # so that the order of floating-point sums is harmless
        assert 1 < mask.count("1") < sampling[0]
        assert digits(policy.mask(schedule)) == mask


def test_teacache_starts_anew_with_the_second_expert(embedder):
    scheduler = wan_scheduler(40, 12.0)
    values = signals(embedder, scheduler.timesteps)["e0"]
    pipe = SimpleNamespace(
        scheduler=scheduler,
        transformer=SimpleNamespace(condition_embedder=embedder),
        transformer_2=SimpleNamespace(condition_embedder=embedder),
        config=SimpleNamespace(boundary_ratio=0.875),
    )
    policy, found = TeaCache(rel_l1_thresh=0.05, coefficients=[1.0, 0.0]), ""
    for name in ("transformer", "transformer_2"):
        schedule = schedule_reader(pipe)(name, 40)
        found += digits(policy.mask(schedule))[schedule.first : schedule.end]
    expected = [simulated(part, [1.0, 0.0], 0.05, 0, 0)[0] for part in (values[:26], values[26:])]
    assert found == "".join(expected)
    assert found != simulated(values, [1.0, 0.0], 0.05, 0, 0)[0]


@pytest.mark.parametrize("signal", ["e", "e0"])
def test_teacache_live_takes_the_masks_decisions_on_both_branches(pipe, signal):
    pipe.scheduler.set_timesteps(12)
    policy = TeaCache(rel_l1_thresh=0.2, signal=signal, coefficients=[-0.5, 1.0, 0.02])
    expected = digits(policy.mask(schedule_reader(pipe)("transformer", 12)))
    cache = ditcache.enable_cache(pipe, policy, head=1, tail=0)
    generate(pipe, steps=12)
    assert 2 < expected.count("1") < 11
    assert decisions(cache) == decisions(cache, "uncond") == expected


def test_magcache_live_takes_the_masks_decisions_on_both_branches(pipe):
    policy = MagCache(threshold=0.12, max_run=2, retention=0.25).fitted("wan2.1-t2v-1.3b")
    expected = digits(policy.mask(Schedule(12)))
    cache = ditcache.enable_cache(pipe, policy, head=1, tail=0)
    by_hand(pipe, steps=12)
    assert decisions(cache) == decisions(cache, "uncond") == expected


# SCM


def runs(mask):
    return [len(list(group)) for digit, group in groupby(mask) if digit == "0"]


def published(preset, steps):
    return digits(SCM(preset=preset, compatible=True).mask(Schedule(steps)))


@pytest.mark.parametrize(
    ("steps", "computed", "longest"),
    [
        (8, (7, 6, 5, 4), (1, 1, 2, 2)),
        (16, (13, 10, 6, 3), (2, 3, 10, 13)),
        (20, (15, 12, 8, 5), (2, 3, 11, 15)),
        (28, (18, 15, 11, 8), (3, 3, 5, 7)),
        (30, (22, 18, 14, 10), (2, 3, 5, 7)),
        (40, (27, 22, 18, 12), (3, 5, 6, 10)),
        (50, (38, 29, 20, 14), (3, 5, 9, 13)),
    ],
)
def test_scm_compatible_gives_cache_dits_counts_and_runs(steps, computed, longest):
    masks = [published(preset, steps) for preset in ("slow", "medium", "fast", "ultra")]
    assert tuple(mask.count("1") for mask in masks) == computed
    assert tuple(max(runs(mask)) for mask in masks) == longest


@pytest.mark.parametrize(
    ("steps", "preset", "mask"),
    [
        (16, "fast", "1111100000000001"),
        (16, "ultra", "1100000000000001"),
        (20, "fast", "11111101000000000001"),
        (20, "ultra", "11110000000000000001"),
        (28, "slow", "1111111101110011100110010001"),
        (28, "medium", "1111110110001100011000110001"),
        (6, "slow", "111001"),
        (6, "ultra", "111001"),
        (4, "medium", "1101"),
        (4, "fast", "1101"),
    ],
)
def test_scm_compatible_gives_cache_dits_strings_degenerate_ones_too(steps, preset, mask):
    assert published(preset, steps) == mask


def test_scm_compatible_is_as_little_monotone_as_cache_dit():
    def counts(preset):
        return {t: published(preset, t).count("1") for t in range(8, 101)}

    assert counts("ultra")[16] == 3 and counts("ultra")[15] == 6
    assert counts("ultra")[43] < counts("ultra")[42]
    assert all(counts(preset)[56] < counts(preset)[55] for preset in PRESETS)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_scm_compatible_has_nothing_for_some_numbers_of_steps(steps):
    """A user may set them, so it must be one line."""
    for preset in PRESETS:
        with pytest.raises(ConfigError, match=f"preset: cache-dit has none for {steps} steps"):
            published(preset, steps)


@pytest.mark.parametrize("preset", PRESETS)
def test_d12_scm_properties_hold_for_any_number_of_steps(preset):
    """First and last step computed, runs bounded, counts monotone and at the preset's share."""
    compute, skip = PRESETS[preset]
    share = sum(compute) / (sum(compute) + sum(skip))
    before = 0
    for steps in range(2, 101):
        mask = digits(SCM(preset=preset).mask(Schedule(steps)))
        count = mask.count("1")
        assert len(mask) == steps
        assert mask[0] == mask[-1] == "1"
        assert max(runs(mask), default=0) <= max(skip)
        assert count >= before  # monotone in the number of steps
        assert count >= share * steps - 1e-9
        # No more than it takes to round up, or to keep runs short.
        assert count < max(2, share * steps, 1 + (steps - 1) / (max(skip) + 1)) + 1
        before = count


@pytest.mark.parametrize("steps", [2, 3, 8, 16, 20, 28, 43, 56, 100])
def test_d12_scm_computes_no_less_for_a_slower_preset(steps):
    counts = [sum(SCM(preset=p).mask(Schedule(steps))) for p in ("slow", "medium", "fast", "ultra")]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("boundary", [1, 6, 13, 27])
def test_d12_scm_lays_a_pattern_out_for_each_expert(preset, boundary):
    policy, whole = SCM(preset=preset), 28
    high = digits(policy.mask(Schedule(whole, first=0, end=boundary)))
    low = digits(policy.mask(Schedule(whole, first=boundary)))
    assert high[:boundary] == digits(policy.mask(Schedule(boundary)))
    assert low[boundary:] == digits(policy.mask(Schedule(whole - boundary)))
    assert set(high[boundary:] + low[:boundary]) <= {"1"}


def test_scm_with_lengths_of_ones_own_repeats_the_last():
    policy = SCM(preset=None, compute=[6, 1], skip=[1, 2])
    assert digits(policy.mask(Schedule(16))) == "1111110100100100"


def test_d11_scm_fits_any_run_and_computes_its_first_step():
    policies = [SCM(preset=None, compute=[1], skip=[3]), *(SCM(preset=p) for p in PRESETS)]
    for policy in policies:
        masks = [policy.mask(Schedule(steps)) for steps in range(1, 60)]
        assert [len(mask) for mask in masks] == list(range(1, 60))
        assert all(mask[0] for mask in masks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "quick"}, "preset: no 'quick'"),
        ({"preset": None}, "give either a preset or compute and skip"),
        ({"compute": [2], "skip": [1]}, "give either a preset or compute and skip"),
        ({"preset": None, "compute": [2]}, "compute and skip belong together"),
        ({"preset": None, "compute": [0], "skip": [1]}, r"every length must be >= 1, got \[0\]"),
        ({"preset": None, "compute": [], "skip": []}, "needs at least one length"),
        (
            {"preset": None, "compute": [1], "skip": [1], "compatible": True},
            "compatible: is for presets",
        ),
    ],
)
def test_scm_refuses_what_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        SCM(**settings)
