"""Projectors: as many parameters as the arithmetic says, closed until trained, refused in words."""

import pytest
import torch

from ditcache.bridge.projectors.base import Shape, partners
from ditcache.bridge.projectors.full import Full
from ditcache.bridge.projectors.gating import Gating
from ditcache.bridge.projectors.identity import Identity
from ditcache.bridge.projectors.weighted import Weighted
from ditcache.errors import DitcacheError

WAN = Shape(layers=40, heads=40, head_dim=128)
PLAIN = {"gate_input": "target", "time_embedding": False}
SHARED = {**PLAIN, "layer_bias": False}
PER_LAYER = {**SHARED, "share_layers": False}
COUNTS = [
    (Identity(), 0),
    (Weighted(learnable_alpha=False, alpha_granularity="global"), 0),
    (Weighted(alpha_granularity="global"), 1),
    (Weighted(alpha_granularity="layer"), 80),
    (Weighted(), 3_200),
    (Gating(**PLAIN), 69_762),
    (Gating(), 201_090),
    (Gating(**PER_LAYER, projector_hidden_dim=32), 332_880),
    (Gating(**PER_LAYER, share_key_value=True), 1_331_240),
    (Gating(**PER_LAYER), 2_662_480),
    (Gating(**PER_LAYER, gate_net="flat"), 105_700_480),
    (Gating(**SHARED, gate_net="flat"), 2_642_512),
    (Gating(**PER_LAYER, gate_granularity="token"), 2_662_480),
    (Gating(**PER_LAYER, gate_granularity="token", gate_net="flat"), 104_898_640),
    (Gating(**SHARED, gate_granularity="value"), 131_840),
    (Gating(**PER_LAYER, gate_granularity="value"), 5_273_600),
    (Gating(**PER_LAYER, gate_granularity="value", gate_net="flat"), 210_145_280),
    (Full(), 1_438_720),
    (Full(gate="head"), 4_101_200),
    (Full(form="low_rank", rank=16), 13_107_200),
    (Full(form="low_rank", rank=64), 52_428_800),
    (Full(form="low_rank", rank=256), 209_715_200),
    (Full(form="dense"), 2_097_152_000),
    (Full(form="concat", projector_hidden_dim=1024), 1_765_625_040),
]


@pytest.mark.parametrize(("spec", "count"), COUNTS, ids=str)
def test_parameters_at_40_layers_of_40_x_128(spec, count):
    with torch.device("meta"):
        assert spec.make(WAN, WAN).num_parameters == count


def test_max_params_is_enforced():
    with torch.device("meta"), pytest.raises(DitcacheError, match=r"201,090 parameters .* 200,000"):
        Gating(max_params=200_000).make(WAN, WAN)


SMALL = Shape(layers=3, heads=2, head_dim=12)
LEARNING = [
    Weighted(alpha_granularity="global"),
    Weighted(),
    *(Gating(gate_granularity=g, projector_hidden_dim=8) for g in ("head", "token", "value")),
    *(
        Gating(gate_granularity=g, gate_net="flat", projector_hidden_dim=8)
        for g in ("head", "token", "value")
    ),
    Gating(share_layers=False, layer_bias=False, share_key_value=True, projector_hidden_dim=8),
    *(Full(form=form, projector_hidden_dim=8) for form in ("kronecker", "low_rank", "dense")),
    *(
        Full(form=form, gate="head", projector_hidden_dim=8)
        for form in ("kronecker", "low_rank", "dense")
    ),
    Full(form="concat", projector_hidden_dim=8),
]


def draw(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = (2, 6, shape.heads, shape.head_dim)
    return tuple(torch.randn(size, generator=generator) for _ in range(2))


@pytest.mark.parametrize("spec", LEARNING, ids=str)
def test_closed_until_trained_and_able_to_open(spec):
    net, time = spec.make(SMALL, SMALL), torch.tensor([0.9, 0.2])
    source, target = draw(SMALL, 1), draw(SMALL, 2)
    fused = net(1, source, target, time)
    assert torch.equal(fused[0], target[0]) and torch.equal(fused[1], target[1])
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0)
    (fused[0] - source[0]).square().sum().add((fused[1] - source[1]).square().sum()).backward()
    optimiser.step()
    opened = net(1, source, target, time)
    assert not torch.equal(opened[0], target[0]) and not torch.equal(opened[1], target[1])


@pytest.mark.parametrize("spec", [Identity(), *LEARNING[:9]], ids=str)
def test_own_keys_and_values_change_nothing(spec):
    net, own = spec.make(SMALL, SMALL), draw(SMALL, 1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    for fused, kept in zip(net(0, own, own, torch.tensor([0.5, 0.5])), own, strict=True):
        assert torch.equal(fused, kept)


def test_a_fixed_alpha_of_zero_and_of_one():
    source, target, time = draw(SMALL, 1), draw(SMALL, 2), torch.zeros(2)
    for alpha, wanted in ((0.0, target), (1.0, source)):
        spec = Weighted(fusion_alpha=alpha, learnable_alpha=False, alpha_granularity="global")
        fused = spec.make(SMALL, SMALL)(0, source, target, time)
        torch.testing.assert_close(fused, wanted)
    assert torch.equal(Identity().make(SMALL, SMALL)(0, source, target, time)[0], source[0])


@pytest.mark.parametrize("form", ["kronecker", "low_rank", "dense", "concat"])
def test_full_maps_other_heads_sizes_and_layers(form):
    source = Shape(layers=2, heads=3, head_dim=8)
    net = Full(form=form, projector_hidden_dim=8).make(source, SMALL)
    assert net.partners == {1: 0, 2: 1}  # the first target layer has no partner
    fused = net(1, draw(source), draw(SMALL), torch.zeros(2))
    assert fused[0].shape == fused[1].shape == (2, 6, 2, 12)


def test_layers_pair_up_from_the_last():
    assert partners(Shape(4, 1, 1), Shape(2, 1, 1)) == {0: 2, 1: 3}


def test_gates_commute_with_the_rotary_embedding_but_not_per_channel():
    """So that scalar, head and token gates may act before or after rotation (fp64)."""
    from ditcache.models.attention import rotate

    angles = torch.randn(1, 6, 1, 6, dtype=torch.float64).repeat_interleave(2, -1)
    rotary = (angles.cos(), angles.sin())
    (source, _), (target, _) = (tuple(x.double() for x in draw(SMALL, seed)) for seed in (1, 2))
    for size, commutes in (((2, 6, 1, 1), True), ((2, 6, 2, 1), True), ((2, 6, 2, 12), False)):
        gate = torch.rand(size, dtype=torch.float64)
        before = rotate(target + gate * (source - target), rotary)
        after = rotate(target, rotary) + gate * (rotate(source, rotary) - rotate(target, rotary))
        assert torch.allclose(before, after, rtol=0, atol=1e-12) == commutes


def test_unequal_shapes_need_a_full_projector():
    other = Shape(layers=3, heads=4, head_dim=12)
    with pytest.raises(DitcacheError, match=r"3 layers of 4 x 12 .* use projector=full"):
        Gating().make(other, SMALL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gating(gate_granularity="heads"), "gate_granularity: no 'heads'. Did you mean 'head'"),
        (lambda: Gating(share_layers=False), "layer_bias: networks per layer have their own"),
        (lambda: Gating(projector_hidden_dim=0), "projector_hidden_dim: must be >= 1, got 0"),
        (lambda: Weighted(fusion_alpha=1.5), "fusion_alpha: must be from 0 to 1, got 1.5"),
        (lambda: Weighted(learnable_alpha=False), "alpha_granularity: has no effect on a fixed alpha"),
        (lambda: Full(form="lowrank"), "form: no 'lowrank'. Did you mean 'low_rank'"),
        (lambda: Full(form="concat", gate="head"), "gate: form=concat weighs"),
        (lambda: Full(rank=0), "rank: must be >= 1, got 0"),
        (lambda: Identity(max_params=-1), "max_params: must be >= 0, got -1"),
    ],
)  # fmt: skip
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
