"""Forecasters by the numbers: what stands in for residuals that were computed at known steps."""

import math
from types import SimpleNamespace

import pytest
import torch

import ditcache
from ditcache.cache.forecasters.fitted import Fitted
from ditcache.cache.forecasters.hermite import Hermite, hermite, ladder
from ditcache.cache.forecasters.hold import Hold
from ditcache.cache.forecasters.taylor import Taylor
from ditcache.cache.forecasters.two_anchor import TwoAnchor
from ditcache.cache.policies.interval import Interval
from ditcache.cache.policies.planned import Planned
from ditcache.cache.settings import CacheSettings
from ditcache.cache.state import UnitState
from ditcache.errors import ConfigError
from ditcache.store.device import DeviceStore

GAPS = [0, 1, 2, 3, 7]  # computed steps with an uneven gap
ASKED = [8, 9, 10, 11]


def new_state():
    return UnitState(DeviceStore(), (1, "transformer", "cond", 0))


def at(state, step, *, sigma=None, hidden=None, probe_residual=None, policy=None):
    """What a forecaster sees of a call."""
    return SimpleNamespace(
        state=state,
        step=step,
        sigma=sigma,
        hidden=hidden,
        probe_residual=probe_residual,
        policy=policy,
    )


def forecasts(forecaster, curve, computed, asked, *, sigmas=None, policy=None):
    """Residuals `curve(step)` seen at `computed` -> what is forecast at `asked`."""
    state = new_state()
    sigma = (lambda step: None) if sigmas is None else sigmas
    for step in computed:
        value = torch.full((1, 2, 3), float(curve(step)), dtype=torch.float64)
        forecaster.observe(at(state, step, sigma=sigma(step), policy=policy), value)
    assert len(state.store.entries) == min(len(computed), forecaster.tensors)
    return [
        float(forecaster.forecast(at(state, step, sigma=sigma(step), policy=policy)).mean())
        for step in asked
    ]


def line(step):
    return 1 + 2 * step


def square(step):
    return step * step


@pytest.mark.parametrize("order", [1, 2, 3])
def test_d17_a_line_is_exact_for_every_order(order):
    values = forecasts(Taylor(order=order), line, GAPS, ASKED)
    assert values == pytest.approx([17, 19, 21, 23], abs=1e-4)


def test_d17_a_parabola_by_order():
    assert forecasts(Taylor(order=1), square, GAPS, ASKED) == [59, 69, 79, 89]
    assert forecasts(Taylor(order=2), square, GAPS, ASKED) == pytest.approx(
        [64, 81, 100, 121], abs=1e-3
    )


def test_a_cubic_at_order_3():
    values = forecasts(Taylor(order=3), lambda t: t**3 - t, [0, 2, 3, 5, 9], [10, 12])
    assert values == pytest.approx([990, 1716], rel=1e-5)


def test_d16_the_slope_counts_from_the_second_computed_step():
    assert forecasts(Taylor(order=1), lambda t: 3 * t, [0], [1]) == [0]
    assert forecasts(Taylor(order=1), lambda t: 3 * t, [0, 1], [2]) == [6]


def test_order_zero_is_hold():
    assert (
        forecasts(Taylor(order=0), lambda t: t, [0, 3], [5])
        == forecasts(Hold(), lambda t: t, [0, 3], [5])
        == [3]
    )


def test_d31_d17_counterpart_must_fail():
    """A parabola is not a line: order 1 is wrong on it, by the amount calculus says."""
    (value,) = forecasts(Taylor(order=1), square, [0, 1], [2])
    assert value == 2 != 4


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("forecaster", [Taylor(order=1), Hermite(order=1), TwoAnchor()])
def test_a_tensor_the_store_lost_means_no_forecast(forecaster, lost):
    state = new_state()
    for step in (0, 1):
        seen = at(state, step, hidden=torch.full((1, 2, 3), float(step)))
        forecaster.observe(seen, torch.ones(1, 2, 3))
    state.store.entries.pop(next(key for key in state.store.entries if key.slot == str(lost)))
    assert forecaster.forecast(at(state, 2, hidden=torch.ones(1, 2, 3))) is None


@pytest.mark.parametrize("slot", ["q0", "q1"])
def test_two_anchor_without_one_of_its_indicators_has_no_forecast(slot):
    state, forecaster = new_state(), TwoAnchor()
    for step in (0, 1):
        forecaster.observe(at(state, step, hidden=torch.ones(1, 2, 3)), torch.ones(1, 2, 3))
    state.store.entries.pop(next(key for key in state.store.entries if key.slot == slot))
    assert forecaster.forecast(at(state, 2, hidden=torch.ones(1, 2, 3))) is None


@pytest.mark.parametrize("forecaster", [Taylor(order=1), Taylor(order=2), Hermite(), TwoAnchor()])
def test_the_forecast_keeps_the_dtype_and_leaves_the_values_alone(forecaster):
    state = new_state()
    hidden = [torch.full((1, 2, 3), float(step**2), dtype=torch.bfloat16) for step in range(4)]
    for step in range(3):
        residual = torch.full((1, 2, 3), float(step), dtype=torch.bfloat16)
        forecaster.observe(at(state, step, hidden=hidden[step]), residual)
    before = {key: tensor.clone() for key, tensor in state.store.entries.items()}
    assert forecaster.forecast(at(state, 3, hidden=hidden[3])).dtype == torch.bfloat16
    assert all(torch.equal(before[key], tensor) for key, tensor in state.store.entries.items())


@pytest.mark.parametrize("order", [-1, 4])
def test_order_out_of_range(order):
    with pytest.raises(ValueError, match=f"order: must be between 0 and 3, got {order}"):
        Taylor(order=order)


# Taylor over log-SNR


def flow(shift=5.0, steps=50):
    """Step -> sigma of a flow schedule."""

    def sigma(step):
        share = 1 - step / steps
        return shift * share / (1 + (shift - 1) * share)

    return sigma


def log_snr(sigma):
    return 2 * math.log((1 - sigma) / sigma)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_over_log_snr_is_exact_on_what_is_linear_in_it(order):
    sigmas = flow()
    curve = lambda step: 3 - 2 * log_snr(sigmas(step))  # noqa: E731
    computed, asked = [2, 5, 9, 20, 30], [31, 35, 44]
    values = forecasts(Taylor(order=order, axis="log_snr"), curve, computed, asked, sigmas=sigmas)
    assert values == pytest.approx([curve(step) for step in asked], rel=1e-5)
    by_step = forecasts(Taylor(order=order), curve, computed, asked, sigmas=sigmas)
    assert by_step != pytest.approx([curve(step) for step in asked], rel=1e-2)


def test_taylor_over_log_snr_stays_finite_where_there_is_only_noise():
    """A flow schedule begins at sigma = 1, where log-SNR is -infinity."""
    values = forecasts(Taylor(axis="log_snr"), line, [0, 1], [2], sigmas=flow())
    assert math.isfinite(values[0])


def test_taylor_over_log_snr_at_steps_it_cannot_tell_apart():
    """Wan2.2's shift of 12 over 100 steps: sigma 1.0 and .9992 are both beyond the clamp."""
    sigmas = flow(shift=12.0, steps=100)
    (value,) = forecasts(Taylor(axis="log_snr"), line, [0, 1], [2], sigmas=sigmas)
    assert math.isfinite(value)


def test_taylor_over_log_snr_needs_sigmas():
    with pytest.raises(ConfigError, match="log_snr needs the sigmas of a scheduler; use step"):
        forecasts(Taylor(axis="log_snr"), line, [0, 1], [2])


def test_an_axis_nobody_knows():
    with pytest.raises(ValueError, match=r"axis: no 'steps'. Did you mean 'step'\?"):
        Taylor(axis="steps")


# Hermite


def direct_hermite(values, gaps, elapsed, order, scale):
    """HiCache's ladder and its forecast as the paper writes them."""
    old: list[float] = []
    for value, gap in zip(values, gaps, strict=True):
        new = [float(value)]
        for k in range(min(order, len(old))):
            new.append((new[k] - old[k]) / gap)
        old = new
    polynomials = [1.0, 2 * scale * elapsed]
    for k in range(1, order):
        polynomials.append(2 * scale * elapsed * polynomials[k] - 2 * k * polynomials[k - 1])
    terms = [d * scale**k * polynomials[k] / math.factorial(k) for k, d in enumerate(old)]
    return old[0] + sum(terms[1:])


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_hermite_against_the_direct_formula(order, scale):
    curve = [5.0, 3.5, 4.0, 8.0, 1.0]
    expected = [direct_hermite(curve, [1, 1, 1, 1, 4], e, order, scale) for e in (1, 2, 3, 4)]
    values = forecasts(
        Hermite(order=order, scale=scale), lambda s: curve[GAPS.index(s)], GAPS, ASKED
    )
    assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.75])
def test_hermite_of_order_1_is_taylor_with_a_damped_slope(scale):
    values = forecasts(Hermite(order=1, scale=scale), line, [0, 3], [4, 6])
    assert values == pytest.approx([7 + 2 * scale**2 * 2 * e for e in (1, 3)])


def test_hermite_of_order_1_at_half_the_root_of_2_is_taylor():
    even = Hermite(order=1, scale=math.sqrt(0.5))
    assert forecasts(even, square, GAPS, ASKED) == pytest.approx(
        forecasts(Taylor(order=1), square, GAPS, ASKED)
    )


def test_hermite_from_order_2_on_does_not_pass_through_the_last_value():
    """At zero steps from it the offset is -scale^2 D2."""
    curve = lambda step: 3.0 * square(step)  # noqa: E731
    (value,) = forecasts(Hermite(order=2, scale=0.5), curve, [0, 1, 2], [2])
    assert value == pytest.approx(12 - 0.25 * 6)


def test_d17_the_ladder_of_differences_is_the_published_one():
    """With Taylor's monomials it gives the reference's values on t^2."""
    values = [
        sum(
            weight * square(step) * e**k / math.factorial(k)
            for k, row in enumerate(ladder([2, 3, 7]))
            for weight, step in zip(row, [2, 3, 7], strict=True)
        )
        for e in (1, 2, 3, 4)
    ]
    assert values == pytest.approx([59.625, 71.5, 84.625, 99])


def test_the_physicists_hermite_polynomials():
    z = 0.7
    assert [hermite(k, z) for k in range(4)] == pytest.approx(
        [1, 2 * z, 4 * z**2 - 2, 8 * z**3 - 12 * z]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 0}, "order: must be between 1 and 3, got 0"),
        ({"order": 4}, "order: must be between 1 and 3, got 4"),
        ({"scale": 0.0}, "scale: must be > 0 and <= 1, got 0.0"),
        ({"scale": 1.5}, "scale: must be > 0 and <= 1, got 1.5"),
    ],
)
def test_hermite_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Hermite(**settings)


# Two anchors


def two_anchors(indicators, *, as_probe=True, limit=2.0, residuals=(1.0, 5.0), shape=(1, 2, 3)):
    """Residuals of two computed steps and the indicator then and now -> the forecast."""
    state, forecaster = new_state(), TwoAnchor(limit=limit)
    seen = []
    for step, q in enumerate(indicators):
        value = torch.as_tensor(q, dtype=torch.float32).view(-1, 1, 1).expand(*shape).clone()
        other = torch.full(shape, 9.0 - step)
        probe, hidden = (value, other) if as_probe else (None, value)
        seen.append(at(state, step, hidden=hidden, probe_residual=probe))
    for ctx, residual in zip(seen[:-1], residuals, strict=True):
        forecaster.observe(ctx, torch.full(shape, residual))
    return forecaster.forecast(seen[-1])[:, 0, 0].tolist()


@pytest.mark.parametrize("as_probe", [True, False])
@pytest.mark.parametrize(
    ("now", "gamma"),
    [(4.0, 1.5), (5.0, 2.0), (9.0, 2.0), (2.5, 1.0), (3.0, 1.0), (-2.0, 1.5)],
)
def test_two_anchor_against_the_direct_formula(now, gamma, as_probe):
    """q2 = 1, q1 = 3: gamma = |now - 1| / 2, clipped to [1, 2]."""
    assert two_anchors([1.0, 3.0, now], as_probe=as_probe) == [1.0 + gamma * 4.0]


def test_two_anchor_measures_each_sample():
    values = two_anchors([[1.0, 1.0], [3.0, 2.0], [4.0, 2.5]], shape=(2, 2, 3))
    assert values == [1.0 + 1.5 * 4, 1.0 + 1.5 * 4]
    values = two_anchors([[1.0, 1.0], [3.0, 2.0], [3.0, 9.0]], shape=(2, 2, 3))
    assert values == [5.0, 9.0]


def test_two_anchor_with_one_anchor_or_none_to_tell_apart_is_hold():
    assert two_anchors([1.0, 3.0], residuals=(5.0,)) == [5.0]
    assert two_anchors([1.0, 1.0, 1.0]) == [5.0]
    assert two_anchors([1.0, 3.0, 9.0], limit=1.0) == [5.0]


def test_two_anchor_keeps_copies_of_its_indicator():
    state, hidden = new_state(), torch.ones(1, 2, 3)
    TwoAnchor().observe(at(state, 0, hidden=hidden), torch.ones(1, 2, 3))
    hidden.zero_()
    assert all(tensor.eq(1).all() for tensor in state.store.entries.values())


def test_two_anchor_out_of_range():
    with pytest.raises(ValueError, match=r"limit: must be >= 1, got 0\.5"):
        TwoAnchor(limit=0.5)


# Fitted


def plan(mask, damping):
    policy = Planned(compute=mask.count("#"))
    policy.plan = {"mask": mask, "damping": damping, "sigmas": []}
    return policy


def test_fitted_follows_the_line_as_far_as_the_plan_says():
    policy = plan("##.#...", [0.5, 0.0, 1.0, 0.25])
    values = forecasts(Fitted(), line, [0, 1], [2], policy=policy)
    assert values == pytest.approx([3 + 0.5 * 2])
    values = forecasts(Fitted(), line, [1, 3], [4, 5, 6], policy=policy)
    assert values == pytest.approx([7 + 0.0, 7 + 1.0 * 4, 7 + 0.25 * 6])


def test_fitted_after_one_computed_step_is_hold():
    assert forecasts(Fitted(), line, [0], [1], policy=plan("#.#", [0.7])) == [1]


def test_a_step_that_the_plan_computes_but_was_skipped_follows_the_line():
    """As with a policy's own max_skips the driver may shift what is skipped."""
    assert plan("##.#", [0.5]).damping(3) == 1.0


def test_fitted_is_refused_without_a_plan(pipe):
    message = "forecaster: fitted takes its numbers from a plan; use cache=planned"
    with pytest.raises(ValueError, match=message):
        CacheSettings(policy=Interval(), forecaster=Fitted())
    for policy in ("interval", Interval()):
        for forecaster in ("fitted", Fitted()):
            with pytest.raises(ConfigError, match=message):
                ditcache.enable_cache(pipe, policy, forecaster)
    assert type(pipe.transformer.blocks) is torch.nn.ModuleList
    CacheSettings(policy=plan("##.#", [0.5]), forecaster=Fitted())


# Each forecaster with what it cannot do: a test that passes for everything tests nothing.
BEYOND = {
    "hold": (Hold(), line),
    "taylor 1": (Taylor(order=1), square),
    "taylor 2": (Taylor(order=2), lambda step: step**3),
    "hermite 1": (Hermite(order=1), square),
    "fitted": (Fitted(), square),
}


@pytest.mark.parametrize("name", BEYOND)
def test_d31_a_forecaster_is_wrong_beyond_its_order(name):
    forecaster, curve = BEYOND[name]
    policy = Planned(compute=5)
    policy.plan = {"mask": "####...#" + "." * 4, "damping": [1.0] * 7}
    values = forecasts(forecaster, curve, GAPS, ASKED, policy=policy)
    away = [abs(value - curve(step)) for value, step in zip(values, ASKED, strict=True)]
    assert min(away) > 0.5 and away == sorted(away), "further off the further it looks"
