"""What policies measure and decide, against the reference's formulas written out a second time, on
numbers made up for the purpose. No transformer runs here.
"""

import math

import numpy as np
import pytest
import torch

import ditcache
from ditcache.cache.driver import Driver
from ditcache.cache.policies.base import Schedule
from ditcache.cache.policies.dbcache import DBCache
from ditcache.cache.policies.dicache import DiCache
from ditcache.cache.policies.easycache import EasyCache
from ditcache.cache.policies.fbcache import FBCache
from ditcache.cache.policies.interval import Interval
from ditcache.cache.policies.magcache import MagCache
from ditcache.cache.policies.planned import Planned
from ditcache.cache.policies.seacache import SeaCache, filtered
from ditcache.cache.policies.teacache import TeaCache, polynomial
from ditcache.cache.run import Call, Run
from ditcache.cache.settings import CacheSettings
from ditcache.cache.signal import change
from ditcache.cache.streams import Work
from ditcache.errors import ConfigError
from ditcache.models.base import Blocks
from ditcache.store.device import DeviceStore

SHAPE = (1, 2, 3, 4, 4)  # of made-up latents [B, C, T, H, W]


class Toy:
    """A driver over one unit, fed by hand: latents and hidden states are the same numbers, and what
    the probe adds are those numbers too.
    """

    def __init__(self, policy, steps=12, **settings):
        self.policy, self.steps = policy, steps
        settings = CacheSettings(policy=policy, **{"head": 1, "tail": 0, **settings})
        self.run = Run(DeviceStore())
        self.driver = Driver("transformer", settings, self.run, 1)

    def step(self, step, latents, branch="cond", sigma=0.5, output=None):
        """Whether it computed."""
        call = Call(branch, step, self.steps, sigma, None, latents)
        self.driver.begin_call(call, lambda expert, steps: self.schedule())
        hidden = latents.flatten(2).mT.contiguous()
        if self.policy.probe:
            residual = hidden
            work = Work([lambda h: h + residual], Blocks(), (torch.zeros_like(hidden),), {})
            hidden = self.driver.run_always(work, front=True)
        self.driver.run_unit(0, Work([lambda h: 2 * h], Blocks(), (hidden,), {}), [])
        self.driver.end_call(2 * latents if output is None else output)
        return self.run.trace.decisions[-1].computed

    def schedule(self):
        """With time embeddings that change by a tenth at every step."""
        values = torch.tensor([1.1**step for step in range(self.steps)], dtype=torch.float64)
        return Schedule(self.steps, embed=lambda: {"e": values[:, None], "e0": values[:, None]})

    def run_all(self, latents, **how):
        return "".join(
            str(int(self.step(step, latents(step), **how))) for step in range(self.steps)
        )

    @property
    def signals(self):
        return [decision.signal for decision in self.run.trace.decisions]


def start(batch=1):
    return torch.rand(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(3)) + 0.5


def growing(rate=1.1):
    """Latents that change by the same share at every step."""
    return lambda step: start() * rate**step


def wandering(seed=0):
    """Latents that change by a share of their own at every step."""
    generator = torch.Generator().manual_seed(seed)
    path = [start()]
    for _ in range(30):
        path.append(path[-1] + 0.2 * torch.rand(1, generator=generator) * torch.randn(
            *SHAPE, generator=generator))  # fmt: skip
    return lambda step: path[step]


def mean_abs(value):
    return value.abs().mean().item()


def relative(value, reference):
    return mean_abs(value - reference) / mean_abs(reference)


# D14: accumulators


@pytest.mark.parametrize(
    "policy",
    [
        TeaCache(rel_l1_thresh=0.25, coefficients=[1.0, 0.0]),
        MagCache(threshold=0.3, max_run=9, retention=0.0, ratios=[0.9] * 12),
        EasyCache(threshold=0.25),
        SeaCache(threshold=0.25),
        DiCache(threshold=0.25),
        DBCache(threshold=9.0, cap=0.5),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_d14_accumulators_start_anew_at_every_compute(policy):
    """Under steady change every third step computes; a sum that went on would compute them all."""
    found = Toy(policy, head=2 if isinstance(policy, EasyCache) else 1).run_all(growing())
    if isinstance(policy, EasyCache):  # needs two computed steps to begin with
        assert found == "110010010010"
    else:
        assert found == "100100100100"


@pytest.mark.parametrize(
    "policy", [EasyCache(threshold=0.25), SeaCache(threshold=0.25), DiCache(threshold=0.25)]
)
def test_d14_accumulators_stand_still_while_the_driver_computes(policy):
    """Six head steps: as if the run had begun with the last of them."""
    assert Toy(policy, head=6).run_all(growing()) == "111111001001"


# Each policy against its formula


def test_fbcache_against_its_formula():
    latents, threshold = wandering(), 0.15
    toy = Toy(FBCache(threshold=threshold))
    mask, reference, signals = "1", latents(0), [None]
    for step in range(1, 12):
        signals.append(relative(latents(step), reference))
        mask += "0" if signals[-1] < threshold else "1"
        reference = latents(step) if mask[-1] == "1" else reference
    assert toy.run_all(latents) == mask
    assert toy.signals[1:] == pytest.approx(signals[1:], rel=1e-5)
    assert 2 < mask.count("1") < 11


@pytest.mark.parametrize("cap", [None, 0.2])
def test_dbcache_against_its_formula(cap):
    latents, threshold = wandering(), 0.15
    toy = Toy(DBCache(threshold=threshold, cap=cap))
    mask, reference, total = "1", latents(0), 0.0
    for step in range(1, 12):
        signal = relative(latents(step), reference)
        total += signal
        reuse = signal < threshold and (cap is None or total < cap)
        mask += "0" if reuse else "1"
        reference, total = (reference, total) if reuse else (latents(step), 0.0)
    assert toy.run_all(latents) == mask
    assert 2 < mask.count("1") < 11


def test_dbcache_with_a_cap_computes_more():
    masks = [Toy(DBCache(threshold=0.25, cap=cap)).run_all(wandering()) for cap in (None, 0.2)]
    assert masks[0].count("1") < masks[1].count("1")


def test_dbcache_pattern_computes_without_asking():
    toy = Toy(DBCache(threshold=9.0, pattern="100010000000"))
    assert toy.run_all(growing()) == "100010000000"
    assert [signal is None for signal in toy.signals[:6]] == [1, 0, 0, 0, 1, 0]


def test_dicache_against_its_formula():
    latents, threshold = wandering(), 0.3
    toy = Toy(DiCache(threshold=threshold))
    mask, total = "1", 0.0
    for step in range(1, 12):
        total += relative(latents(step), latents(step - 1))
        mask += "0" if total < threshold else "1"
        total = total if total < threshold else 0.0
    assert toy.run_all(latents) == mask
    assert 2 < mask.count("1") < 11


def test_easycache_against_its_formula():
    """Input x, output o = 2x + a drift of its own."""
    x, threshold, head = wandering(), 0.3, 2
    drift = wandering(seed=5)
    o = lambda step: 2 * x(step) + drift(step)  # noqa: E731
    toy = Toy(EasyCache(threshold=threshold), head=head)
    mask, total, slope, last, signals = "", 0.0, None, None, []
    for step in range(12):
        signal = None
        if step < head:
            compute, total = True, 0.0
        else:
            total += slope * mean_abs(x(step) - x(step - 1)) / mean_abs(o(last))
            signal, compute = total, not total < threshold
        if compute:
            total = 0.0
            if last is not None:
                slope = mean_abs(o(step) - o(last)) / mean_abs(x(step) - x(last))
            last = step
        mask += str(int(compute))
        signals.append(signal)
    found = "".join(str(int(toy.step(step, x(step), output=o(step)))) for step in range(12))
    assert found == mask
    assert toy.signals[head:] == pytest.approx(signals[head:], rel=1e-4)
    assert 3 < mask.count("1") < 11


def filtered_by_the_formula(latents, sigma, beta):
    """SeaCache's indicator in numpy and double precision."""
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    a, c, gain = 1 - sigma, sigma, np.ones((1, 1, 1))
    for axis, size in enumerate(latents.shape[2:]):
        power = 1 / (np.abs(np.fft.fftfreq(size)) ** beta + 1e-16)
        along = a * power / (a**2 * power + c**2 + 1e-16)
        gain = gain * along.reshape([-1 if i == axis else 1 for i in range(3)])
    spectrum = np.fft.fftn(latents.double().numpy(), axes=(2, 3, 4))
    return torch.from_numpy(np.fft.ifftn(spectrum * gain / gain.mean(), axes=(2, 3, 4)).real)


@pytest.mark.parametrize("sigma", [1.0, 0.7, 0.05, 0.0])
@pytest.mark.parametrize("beta", [2.0, 3.0])
def test_seacache_filter_against_its_formula(sigma, beta):
    latents = torch.randn(2, 3, 5, 8, 6, generator=torch.Generator().manual_seed(0))
    found = filtered(latents, sigma, beta)
    assert found.dtype == torch.float32
    expected = filtered_by_the_formula(latents, sigma, beta).float()
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(filtered(latents.bfloat16(), sigma, beta),
                       filtered(latents.bfloat16().float(), sigma, beta))  # fmt: skip


def test_seacache_against_its_formula():
    x, threshold = wandering(), 0.3
    sigmas = [1 - step / 12 for step in range(12)]
    seen = [filtered_by_the_formula(x(step), sigmas[step], 3.0) for step in range(12)]
    mask, total = "1", 0.0
    for step in range(1, 12):
        total += relative(seen[step], seen[step - 1])
        mask += "0" if total < threshold else "1"
        total = total if total < threshold else 0.0
    toy = Toy(SeaCache(threshold=threshold))
    found = "".join(str(int(toy.step(s, x(s), sigma=sigmas[s]))) for s in range(12))
    assert found == mask
    assert 2 < mask.count("1") < 11


def test_interval_counts_from_the_last_head_step():
    mask = Interval(every=3).mask(Schedule(11, head=2))
    assert [step for step in range(11) if mask[step]] == [0, 1, 4, 7, 10]


def test_a_polynomial_is_read_with_its_highest_degree_first():
    assert polynomial([2.0, 0.0, -1.0], 3.0) == 17.0


def test_teacache_adds_negative_values_as_they_are():
    """Like the original; the absolute value would compute earlier."""
    coefficients = [0.0, 1.0]
    policy = TeaCache(rel_l1_thresh=1.5, coefficients=coefficients)
    for sign, expected in ((1, "10101010"), (-1, "10000000")):
        schedule = Schedule(8)
        policy.coefficients = [0.0, sign * 1.0]
        assert "".join(str(int(c)) for c in policy.decide(schedule, [0.1] * 8)) == expected


@pytest.mark.parametrize("constant", [-1.0, 0.0, 1.0])
def test_d32_teacache_at_threshold_zero_computes_whatever_the_polynomial(constant):
    policy = TeaCache(rel_l1_thresh=0.0, coefficients=[0.0, constant])
    assert all(policy.decide(Schedule(9), [0.1] * 9))


def test_d32_magcache_at_threshold_zero_computes_even_at_ratio_1():
    policy = MagCache(threshold=0.0, retention=0.0, ratios=[1.0] * 9)
    assert all(policy.mask(Schedule(9)))


def test_magcache_counts_retention_in_steps_of_the_expert():
    policy = MagCache(threshold=9.0, max_run=99, retention=0.25, ratios=[1.0] * 20)
    mask = policy.mask(Schedule(20, first=6))  # 14 steps of its own, of which 3.5 are retained
    assert [step for step in range(20) if not mask[step]] == list(range(10, 20))


# D25: batches


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize(
    "policy",
    [FBCache(0.25), DBCache(0.25), DiCache(0.25), SeaCache(0.25), EasyCache(0.25)],
    ids=lambda policy: type(policy).__name__,
)
def test_d25_one_restless_sample_computes(policy, turn):
    """cache-dit takes one mean over the batch, in which the restless one would drown."""

    def batch(rates):
        values = start(len(rates))
        scale = torch.tensor(rates).view(-1, 1, 1, 1, 1)
        return lambda step: values * scale**step

    calm, restless, tame = [1.01, 1.02], [1.01, 1.5][::turn], [1.1, 1.1]
    assert Toy(policy, head=2).run_all(batch(calm))[2:6] == "0000"
    assert Toy(policy, head=2).run_all(batch(restless)) == "1" * 12
    assert "0" in Toy(policy, head=2).run_all(batch(tame))


def test_d25_the_signal_is_that_of_the_most_restless_sample():
    toy = Toy(FBCache(9.0))
    one, two = growing(1.1), growing(1.2)
    for step in range(3):
        toy.step(step, torch.cat([one(step), two(step)]))
    assert toy.signals[1:] == pytest.approx([0.2, 0.44], rel=1e-4)


# D22: signals that are not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "policy",
    [FBCache(0.5), DBCache(0.5), DiCache(0.5), SeaCache(0.5), EasyCache(0.5)],
    ids=lambda policy: type(policy).__name__,
)
def test_d22_a_signal_that_is_not_finite_computes_and_says_so(policy, bad):
    """Also the step after it, where the reference is bad; then all is as before."""

    def broken(step):
        latents = growing(1.02)(step)
        if step == 4:
            latents[0, 0, 0, 0, 0] = bad
        return latents

    with pytest.warns(UserWarning, match="a signal is not finite; computing instead of reusing"):
        found = Toy(policy, head=2).run_all(broken)
    assert found[2:5] == "001" and found[8:] == "0000"


# D13: a changed dtype


@pytest.mark.parametrize(
    "policy",
    [Interval(99), FBCache(9.0), DBCache(9.0), DiCache(9.0), SeaCache(9.0), EasyCache(9.0)],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize("granularity", ["stack", "output"])
def test_d13_a_changed_dtype_computes(policy, granularity):
    """cache-dit reuses without a look at high thresholds."""

    def halved(step):
        return growing(1.02)(step).to(torch.float32 if step < 6 else torch.bfloat16)

    toy = Toy(policy, head=2, granularity=granularity)
    found = toy.run_all(halved)
    assert found[2:7] == "00001" and "0" in found[7:]
    assert toy.run.trace.decisions[6].reason == "shape"


# D11: settings that do not fit the run


@pytest.mark.parametrize("head", [1, 12])
@pytest.mark.parametrize("steps", [5, 20])
def test_d11_a_pattern_of_the_wrong_length_is_refused_at_the_first_step(steps, head):
    toy = Toy(DBCache(pattern="1" * steps), head=head)
    with pytest.raises(ConfigError, match=f"pattern: has {steps} steps, the run has 12"):
        toy.step(0, start())


def test_d11_a_pattern_that_skips_the_first_step_is_refused():
    with pytest.raises((ValueError, ConfigError), match="first step"):
        Toy(DBCache(pattern="0" + 11 * "1")).step(0, start())


def planned(mask="#..#.#..#..#", sigmas=()):
    policy = Planned(compute=mask.count("#"))
    policy.plan = {"mask": mask, "damping": [0.5] * mask.count("."), "sigmas": list(sigmas)}
    return policy


def test_d11_a_plan_of_the_wrong_length_is_refused_at_the_first_step():
    with pytest.raises(ConfigError, match=r"plans are for steps=9, this run has 12; run `ditcache"):
        Toy(planned("#..#.#..#")).step(0, start())


def test_d11_a_plan_for_another_schedule_is_refused():
    known = [1.0, 0.8, 0.5]
    mask = planned("#.#", known).mask(Schedule(3, sigmas=(1.0, 0.8003, 0.5)))
    assert mask == [True, False, True]
    with pytest.raises(ConfigError, match=r"sigma 0\.8000 at step 1, this schedule has 0\.9000"):
        planned("#.#", known).mask(Schedule(3, sigmas=(1.0, 0.9, 0.7)))


def test_a_plan_without_sigmas_to_compare_is_taken_on_trust():
    assert planned("#.#", [1.0, 0.8, 0.5]).mask(Schedule(3)) == [True, False, True]


# Calibrations


def calibration(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_policies_take_their_constants_from_a_file(tmp_path):
    path = calibration(
        tmp_path,
        "teacache: {e: {coefficients: [1, 2]}}\nmagcache: {steps: 2, cond: [1.0, 0.5]}\n"
        "planned: {steps: 3, sigmas: [1, 0.5, 0.1], plans: {2: {mask: '#.#', damping: [1]}}}\n",
    )
    assert TeaCache(signal="e", calibration=path).fitted(None).coefficients == [1.0, 2.0]
    assert MagCache(calibration=path).fitted(None).ratios == [1.0, 0.5]
    assert Planned(compute=2, calibration=path).fitted(None).plan["mask"] == "#.#"
    assert Planned(compute=3).fitted(path).plan["mask"] == "###"


def test_knobs_win_over_the_models_calibration(tmp_path):
    path = calibration(tmp_path, "teacache: {e: {coefficients: [1, 2]}}\n")
    policy = TeaCache(signal="e", coefficients=[3.0, 4.0], calibration="nothing.yaml")
    assert policy.fitted("nothing").coefficients == [3.0, 4.0]
    assert TeaCache(signal="e", calibration=path).fitted("nothing").coefficients == [1.0, 2.0]


@pytest.mark.parametrize("policy", [TeaCache(), MagCache(), Planned()])
@pytest.mark.parametrize(
    ("known", "message"),
    [
        (None, "this model has no"),
        ("wan2.1-vace-13b", r"no 'wan2.1-vace-13b'. Did you mean 'wan2.1-vace-1.3b'\?"),
        ("/nowhere/mine.yaml", "cannot read /nowhere/mine.yaml: No such file"),
    ],
)
def test_constants_nobody_has_say_what_to_do(policy, known, message):
    with pytest.raises(ConfigError, match=message):
        policy.fitted(known)


def test_a_polynomial_for_another_signal_only():
    with pytest.raises(ConfigError, match=r"no polynomial for signal e0 \(only e\)"):
        TeaCache(signal="e0").fitted("wan2.2-ti2v-5b-t2v")


def test_a_number_of_computed_steps_that_has_no_plan(tmp_path):
    path = calibration(
        tmp_path,
        "planned: {steps: 3, sigmas: [1, 1, 1], plans: {2: {mask: '#.#', damping: [1]}}}\n",
    )
    with pytest.raises(ConfigError, match="has plans for 2 of 3 steps, got 9"):
        Planned(compute=9).fitted(path)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (TeaCache(signal="e"), "- a list\n"),
        (TeaCache(signal="e"), "teecache: {}\n"),
        (TeaCache(signal="e"), "teacache: {e: [1, 2]}\n"),
        (TeaCache(signal="e"), "teacache: {e: {coefficients: [one, two]}}\n"),
        (MagCache(), "magcache: 3\n"),
        (MagCache(), "magcache: {cond: [one]}\n"),
        (Planned(compute=2), "planned: {plans: {2: {mask: '#.#', damping: [1]}}}\n"),
        (Planned(compute=2), "planned: {steps: 3, plans: {2: {mask: '#.#', damping: [1]}}}\n"),
        (Planned(compute=2), "planned: {steps: 3, sigmas: [1, 1, 1], plans: {2: '#.#'}}\n"),
    ],
)
def test_a_damaged_calibration_is_one_line(tmp_path, policy, text):
    with pytest.raises(ConfigError, match="calibration"):
        policy.fitted(calibration(tmp_path, text))


def test_a_model_nobody_calibrated_is_refused_when_the_cache_is_enabled(checkpoints):
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(checkpoints["wan"])
    for policy in ("teacache", "magcache", "planned"):
        with pytest.raises(ConfigError, match="this model has no"):
            ditcache.enable_cache(pipe, policy)
    assert type(pipe.transformer.blocks) is torch.nn.ModuleList


# Ranges


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        *(
            (policy, {"threshold": value}, f"threshold: must be >= 0, got {value}")
            for policy in (MagCache, EasyCache, SeaCache, FBCache, DBCache, DiCache)
            for value in (-0.1, math.nan)
        ),
        *(
            (TeaCache, {"rel_l1_thresh": value}, f"rel_l1_thresh: must be >= 0, got {value}")
            for value in (-0.1, math.nan)
        ),
        (TeaCache, {"signal": "e1"}, "signal: no 'e1'"),
        (TeaCache, {"coefficients": [1.0]}, r"coefficients: needs two or more, got \[1.0\]"),
        (MagCache, {"max_run": -1}, "max_run: must be >= 0, got -1"),
        (MagCache, {"retention": 1.5}, "retention: must be between 0 and 1, got 1.5"),
        (MagCache, {"ratios": []}, "ratios: needs one per step, got none"),
        (SeaCache, {"beta": 0.0}, "beta: must be > 0, got 0.0"),
        (DBCache, {"front": 0}, "front: must be >= 1, got 0"),
        (DBCache, {"back": -1}, "back: must be >= 0, got -1"),
        (DBCache, {"cap": 0.0}, "cap: must be > 0, got 0.0"),
        (DBCache, {"pattern": "1x0"}, "pattern: must consist of 0 and 1, got '1x0'"),
        (DiCache, {"depth": 0}, "depth: must be >= 1, got 0"),
        (Planned, {"compute": 1}, "compute: must be >= 2, got 1"),
        (Interval, {"every": 0}, "every: must be >= 1, got 0"),
    ],
)
def test_values_out_of_range(policy, settings, message):
    with pytest.raises(ValueError, match=message):
        policy(**settings)


def test_change_is_relative_to_the_reference_and_per_sample():
    reference = torch.tensor([[1.0, -3.0], [2.0, 2.0]])
    value = torch.tensor([[1.0, -1.0], [2.0, 2.0]])
    assert change(value, reference).tolist() == [0.5, 0.0]
