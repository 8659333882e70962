"""Taylor of order k is exact on polynomials of degree k, whatever the gaps, with k + 1 tensors."""

import pytest
import torch

from ditcache.cache.forecasters.hold import Hold
from ditcache.cache.forecasters.taylor import Taylor
from ditcache.cache.state import UnitState
from ditcache.store.device import DeviceStore


def forecasts(forecaster, polynomial, computed, asked, dtype=torch.float64):
    state = UnitState(DeviceStore(), (1, "transformer", "cond", 0))
    for step in computed:
        forecaster.observe(state, step, torch.full((1, 2, 3), float(polynomial(step)), dtype=dtype))
    assert len(state.store.entries) == min(len(computed), forecaster.tensors)
    return [float(forecaster.forecast(state, step).mean()) for step in asked]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_d17_a_line_is_exact_for_every_order(order):
    values = forecasts(Taylor(order=order), lambda t: 1 + 2 * t, [0, 1, 2, 3, 7], [8, 9, 10, 11])
    assert values == pytest.approx([17, 19, 21, 23], abs=1e-4)


def test_d17_a_parabola_by_order():
    square = lambda t: t * t  # noqa: E731
    assert forecasts(Taylor(order=1), square, [0, 1, 2, 3, 7], [8, 9, 10, 11]) == [59, 69, 79, 89]
    assert forecasts(Taylor(order=2), square, [0, 1, 2, 3, 7], [8, 9, 10, 11]) == pytest.approx(
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


def test_d17_counterpart_must_fail():
    """A parabola is not a line: order 1 is wrong on it, by the amount calculus says."""
    (value,) = forecasts(Taylor(order=1), lambda t: t * t, [0, 1], [2])
    assert value == 2 != 4


@pytest.mark.parametrize("lost", [0, 1])
def test_a_tensor_the_store_lost_means_no_forecast(lost):
    state = UnitState(DeviceStore(), (1, "transformer", "cond", 0))
    forecaster = Taylor(order=1)
    for step in (0, 1):
        forecaster.observe(state, step, torch.ones(1, 2, 3))
    state.store.entries.pop(next(key for key in state.store.entries if key.slot == str(lost)))
    assert forecaster.forecast(state, 2) is None


def test_the_forecast_keeps_the_dtype_and_leaves_the_values_alone():
    state, forecaster = UnitState(DeviceStore(), (1, "t", "cond", 0)), Taylor(order=2)
    for step in range(3):
        forecaster.observe(state, step, torch.full((1, 2, 3), float(step), dtype=torch.bfloat16))
    before = {key: tensor.clone() for key, tensor in state.store.entries.items()}
    assert forecaster.forecast(state, 3).dtype == torch.bfloat16
    assert all(torch.equal(before[key], tensor) for key, tensor in state.store.entries.items())


@pytest.mark.parametrize("order", [-1, 4])
def test_order_out_of_range(order):
    with pytest.raises(ValueError, match=f"order: must be between 0 and 3, got {order}"):
        Taylor(order=order)
