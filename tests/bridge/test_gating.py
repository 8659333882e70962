"""The gate computes its formula, whole and in slices, and slices change no projector's result."""

import itertools
import math

import pytest
import torch

from ditcache.bridge import nets
from ditcache.bridge.nets import time_features
from ditcache.bridge.projectors.base import Shape
from ditcache.bridge.projectors.full import Full
from ditcache.bridge.projectors.gating import Gating
from ditcache.bridge.projectors.weighted import Weighted

SMALL = Shape(layers=3, heads=2, head_dim=6)
LAYER, SIGMAS = 1, torch.tensor([0.9, 0.2], dtype=torch.float64)
SPECS = [
    Gating(
        gate_granularity=granularity,
        gate_net=net,
        gate_input=seen,
        time_embedding=time,
        share_layers=share_layers,
        layer_bias=layer_bias,
        share_key_value=share_key_value,
        projector_hidden_dim=5,
    )
    for granularity, net, seen, time, (share_layers, layer_bias), share_key_value in (
        itertools.product(
            ("head", "token", "value"),
            ("per_head", "flat"),
            ("both", "target"),
            (True, False),
            ((True, True), (True, False), (False, False)),
            (True, False),
        )
    )
]
SLICED = [
    Weighted(),
    *(Gating(gate_granularity=g, projector_hidden_dim=8) for g in ("head", "token", "value")),
    Full(),
    Full(gate="head", projector_hidden_dim=8),
]


def plain(spec, net, which, source, target):
    """t + g (s - t), g = tanh(W_out silu(W_in x + b_in + W_time e + b_time) + b_out + b_layer), the
    gate for one head after the other. x: [t, s - t] of a head, their mean over heads, or all heads
    side by side.
    """
    weights = dict(net.named_parameters())
    number = 0 if spec.share_layers else LAYER
    number = number if spec.share_key_value else 2 * number + which
    into, out = (linear_of(weights, f"gates.{number}.{end}") for end in ("into", "out"))
    told = 0
    if spec.time_embedding:
        told = linear_of(weights, "time")(time_features(SIGMAS).double())[:, None]
    bias = weights["bias"][LAYER, which] if spec.layer_bias else 0

    def read(t, s):
        x = torch.cat([t, s - t], -1) if spec.gate_input == "both" else t
        hidden = into(x) + told
        return out(hidden * torch.sigmoid(hidden))

    heads, size = SMALL.heads, SMALL.head_dim
    if spec.gate_net == "flat":
        raw = read(target.flatten(2), source.flatten(2)) + bias
    elif spec.gate_granularity == "token":
        raw = read(target.mean(2), source.mean(2)) + bias
    else:
        raw = torch.cat([read(target[:, :, h], source[:, :, h]) for h in range(heads)], -1) + bias
    shape = {"head": (heads, 1), "token": (1, 1), "value": (heads, size)}[spec.gate_granularity]
    return target + torch.tanh(raw).unflatten(2, shape) * (source - target)


def linear_of(weights, name):
    return lambda x: x @ weights[f"{name}.weight"].mT + weights[f"{name}.bias"]


def opened(spec, dtype=torch.float64):
    """A net whose weights are all at work."""
    torch.manual_seed(0)
    net = spec.make(SMALL, SMALL).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    return net


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    size = (2, 7, SMALL.heads, SMALL.head_dim)
    return tuple(torch.randn(size, generator=generator, dtype=dtype) for _ in range(2))


@pytest.fixture
def slices(monkeypatch):
    """Three tokens or fewer at a time, of seven."""
    monkeypatch.setattr(nets, "LARGE", 0)
    monkeypatch.setattr(nets, "SLICE", 2 * 3 * SMALL.heads * 2 * SMALL.head_dim)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_gate_is_its_formula(spec, slices):
    net, source, target = opened(spec), draw(1), draw(2)
    wanted = tuple(plain(spec, net, i, source[i], target[i]) for i in (0, 1))
    whole = net(LAYER, source, target, SIGMAS)
    with torch.no_grad():
        sliced = net(LAYER, source, target, SIGMAS)
    torch.testing.assert_close(whole, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(sliced, wanted, rtol=0, atol=1e-12)
    weights = list(net.parameters())
    ours, theirs = (
        torch.autograd.grad(sum(x.square().sum() for x in found), weights, materialize_grads=True)
        for found in (whole, wanted)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", SLICED, ids=str)
def test_slices_change_nothing(spec, slices):
    net, source, target = opened(spec), draw(1), draw(2)
    assert net.tokens_at_once(target[0]) == 7
    with torch.no_grad():
        assert 1 <= net.tokens_at_once(target[0]) < 7
        sliced = net(LAYER, source, target, SIGMAS)
    torch.testing.assert_close(sliced, net(LAYER, source, target, SIGMAS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SLICED, ids=str)
def test_closed_in_slices_as_well(spec, dtype, slices):
    net, source, target = spec.make(SMALL, SMALL).to(dtype), draw(1, dtype), draw(2, dtype)
    with torch.no_grad():
        fused = net(LAYER, source, target, SIGMAS)
    assert all(torch.equal(x, own) for x, own in zip(fused, target, strict=True))


def test_few_tokens_go_at_once():
    spec = Gating()
    net, heads = spec.make(SMALL, SMALL), SMALL.heads * spec.projector_hidden_dim
    with torch.no_grad():
        for tokens, sliced in ((nets.LARGE // heads, False), (nets.LARGE // heads + 1, True)):
            count = net.tokens_at_once(torch.empty(1, tokens, SMALL.heads, SMALL.head_dim))
            assert (count < tokens) == sliced


def test_large_matrices_take_all_tokens_at_once(slices):
    target = draw(2)[0]
    with torch.no_grad():
        for spec in (Gating(gate_net="flat"), Full(form="low_rank"), Full(form="dense")):
            assert spec.make(SMALL, SMALL).tokens_at_once(target) == 7


def test_the_noise_level_as_waves_from_fast_to_slow():
    found = time_features(SIGMAS)
    for row, sigma in zip(found, SIGMAS.tolist(), strict=True):
        for i in (0, 1, 64, 127):
            angle = 1000 * sigma / 10_000 ** (i / 128)
            assert row[i] == pytest.approx(math.cos(angle), abs=2e-4)
            assert row[128 + i] == pytest.approx(math.sin(angle), abs=2e-4)
