"""A bridge at work: closed is the target, drivers agree, branches and sources keep apart, the source
is asked exactly as often as promised.
"""

import copy
from dataclasses import replace

import pytest
import torch
from random_checkpoints import small_transformer

from ditcache.bridge.capture import Seen, capture, shape_of
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.projectors.full import Full
from ditcache.bridge.projectors.gating import Gating
from ditcache.bridge.projectors.identity import Identity
from ditcache.bridge.projectors.weighted import Weighted
from ditcache.bridge.readers import walk
from ditcache.bridge.run import Bridge, Source
from ditcache.errors import DitcacheError
from ditcache.store.device import DeviceStore
from ditcache.store.tiered import TieredStore

WAN, CHRONO = "WanTransformer3DModel", "ChronoEditTransformer3DModel"
TEXTS = {name: torch.randn(1, 512, 64) for name in ("cond", "uncond")}
IMAGE = torch.randn(1, 5, 16)
HALF = Weighted(learnable_alpha=False, alpha_granularity="global")


def model(cls=WAN, seed=0):
    torch.manual_seed(seed)
    return small_transformer(cls, 36, 16).eval().requires_grad_(False)


TARGET, SOURCE = model(WAN, 1), model(CHRONO, 2)
SHAPE = shape_of(TARGET)


def opened(spec, seed=3):
    """A projector with random weights."""
    net = spec.make(SHAPE, SHAPE).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    return net


def rule(**settings):
    return Fusion(fusion_direction="chrono_to_wan", **settings)


def source(net, transformer=SOURCE, texts=TEXTS, image=IMAGE):
    return Source(transformer, net, texts, image)


def latents(frames=8, seed=0):
    return torch.randn(1, 36, frames, 4, 4, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(sources, fusion=None, *, sigmas=(0.9, 0.5), target=TARGET, frames=8, store=None, cut=None):
    """Every velocity of a short denoising with both branches, and the bridge."""
    bridge = Bridge(target, sources, fusion or rule(), store or DeviceStore())
    x, found = latents(frames), []
    with bridge.attached(TEXTS):
        for index, sigma in enumerate(sigmas):
            if cut == index:
                x = x[:, :, [0, -1]]
            for branch in ("cond", "uncond"):
                seen = Seen(x, torch.tensor([1000.0 * sigma]), TEXTS[branch], IMAGE)
                found.append(seen.call(target))
            x = 0.9 * x  # not by a velocity, which would carry one branch into the other
    return found, bridge


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def differ(a, b):
    return not any(torch.equal(x, y) for x, y in zip(a, b, strict=True))


PLAIN = run({})[0]


@pytest.mark.parametrize("cls", [WAN, CHRONO])
@pytest.mark.parametrize("frames", [2, 8])
def test_capture_and_walk_are_the_models_own_forward(cls, frames):
    transformer = model(cls, 4)
    seen = Seen(latents(frames), torch.tensor([700.0]), TEXTS["cond"], IMAGE)
    with torch.no_grad():
        velocity, found = capture(transformer, seen)
        assert torch.equal(velocity, seen.call(transformer))
    for (index, walked), own in zip(walk(transformer, seen), found, strict=True):
        assert torch.equal(walked[0], own[0]) and torch.equal(walked[1], own[1]), index


@pytest.mark.parametrize(
    "net",
    [
        Gating(projector_hidden_dim=8).make(SHAPE, SHAPE),
        Full(form="concat", projector_hidden_dim=8).make(SHAPE, SHAPE),
        Full().make(SHAPE, SHAPE),
        Weighted(fusion_alpha=0.0, learnable_alpha=False, alpha_granularity="global").make(
            SHAPE, SHAPE
        ),
    ],
    ids=["gating", "concat", "kronecker", "alpha 0"],
)
@pytest.mark.parametrize("driver", ["stream", "store"])
def test_an_untrained_bridge_is_the_target(net, driver):
    found, bridge = run({"chrono": source(net)}, rule(driver=driver, renorm_k=True))
    assert same(found, PLAIN) and bridge.forwards == 4


@pytest.mark.parametrize("driver", ["stream", "store"])
def test_identity_with_its_own_keys_and_values_is_the_target(driver):
    own = {"self": source(Identity().make(SHAPE, SHAPE), TARGET)}
    assert same(run(own, rule(driver=driver))[0], PLAIN)


def test_an_absent_source_is_the_target():
    assert same(PLAIN, run({"chrono": source(opened(HALF))}, rule(window=[0.95, 1.0]))[0])
    found, bridge = run({"chrono": source(opened(HALF))}, rule(branches="cond"))
    assert torch.equal(found[1], PLAIN[1]) and not torch.equal(found[0], PLAIN[0])
    assert {branch for _, _, branch in bridge.asked} == {"cond"}


SPECS = [HALF, Gating(projector_hidden_dim=8), Full(form="concat", projector_hidden_dim=8)]
RULES = [
    {},
    {"refresh_every": 2},
    {"refresh_every": None, "refresh_drop": 0.3},
    {"branches": "cond_for_both"},
    {"layers": 2, "leave_last_frame": True},
    {"source_frames": "ends", "renorm_k": True},
]


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_the_drivers_agree_bit_for_bit(settings, tmp_path):
    sigmas, spec = (0.9, 0.7, 0.5, 0.2), SPECS[RULES.index(settings) % len(SPECS)]
    sources = {"chrono": source(opened(spec))}
    streamed, one = run(sources, rule(**settings), sigmas=sigmas)
    for store in (DeviceStore(), TieredStore(gpu="20KiB", cpu="30KiB", disk="1MiB")):
        store.open(tmp_path)
        stored, other = run(sources, rule(driver="store", **settings), sigmas=sigmas, store=store)
        assert same(streamed, stored) and one.asked == other.asked
        assert store.stats()["entries"] == 0
        store.close()
    assert differ(streamed, run({}, sigmas=sigmas)[0])


def test_what_the_store_loses_is_computed_again_the_same():
    sources, settings = {"chrono": source(opened(HALF))}, {"refresh_every": 2}
    tight = TieredStore(gpu="9KiB", cpu=0, disk=0)
    found, bridge = run(sources, rule(driver="store", **settings), store=tight)
    assert bridge.recomputed > 0 and same(found, run(sources, rule(**settings))[0])


def test_branches_never_mix():
    for poisoned, clean in (("cond", 1), ("uncond", 0)):
        texts = {**TEXTS, poisoned: torch.full_like(TEXTS[poisoned], float("nan"))}
        sources = {"chrono": source(opened(HALF), texts=texts)}
        for driver in ("stream", "store"):
            found, _ = run(sources, rule(driver=driver, refresh_every=2), sigmas=(0.9, 0.8, 0.5))
            assert all(torch.isfinite(x).all() for x in found[clean::2])
            assert not any(torch.isfinite(x).all() for x in found[1 - clean :: 2])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"refresh_every": 2}, [0, 2, 4]),
        ({"refresh_every": 5}, [0, 5]),
        ({"refresh_every": None, "refresh_drop": 0.3}, [0, 3, 5]),
        ({"window": [0.2, 0.65]}, [3, 4, 5][:2]),
        ({"window": [0.0, 0.75], "refresh_every": 2}, [2, 4]),
    ],
    ids=str,
)
@pytest.mark.parametrize("driver", ["stream", "store"])
def test_the_source_is_asked_exactly_as_often_as_promised(settings, steps, driver):
    sigmas = (0.95, 0.85, 0.7, 0.6, 0.4, 0.1)
    calls = []
    handle = SOURCE.blocks[0].register_forward_hook(lambda *a: calls.append(1))
    _, bridge = run(
        {"chrono": source(opened(HALF))}, rule(driver=driver, **settings), sigmas=sigmas
    )
    handle.remove()
    assert [s for s, _, branch in bridge.asked if branch == "cond"] == steps
    assert [s for s, _, branch in bridge.asked if branch == "uncond"] == steps
    assert len(calls) == bridge.forwards == 2 * len(steps)
    assert rule(**settings).refreshes(list(sigmas)) == steps


def test_stream_stops_after_the_deepest_layer_it_needs():
    calls = []
    handles = [
        block.register_forward_hook(lambda *a, i=i: calls.append(i))
        for i, block in enumerate(SOURCE.blocks)
    ]
    run({"chrono": source(opened(HALF))}, rule(layers=2), sigmas=(0.5,))
    for handle in handles:
        handle.remove()
    assert sorted(calls) == [0, 0, 1, 1]


def test_several_sources_in_any_order():
    third = model(CHRONO, 5)
    parts = [
        ("a", source(opened(Gating(projector_hidden_dim=8)))),
        ("b", source(opened(HALF), third)),
        ("c", source(opened(Full(form="concat", projector_hidden_dim=8), 7), TARGET)),
    ]
    forward, bridge = run(dict(parts))
    assert same(forward, run(dict(reversed(parts)))[0])
    assert bridge.forwards == 3 * 4
    assert differ(forward, run(dict(parts[:2]))[0])


def test_closed_sources_beside_each_other_change_nothing():
    net = Gating(projector_hidden_dim=8).make(SHAPE, SHAPE)
    assert same(run({"a": source(net), "b": source(net, model(CHRONO, 5))})[0], PLAIN)


def test_two_frames_of_the_source_reach_frames_0_and_7_only():
    from ditcache.bridge.capture import fuse

    tokens = torch.randn(1, 8 * 4, 2, 24)
    said = torch.randn(1, 2 * 4, 2, 24)
    net = Identity().make(SHAPE, SHAPE)
    fusion = rule(source_frames="ends")
    key, value = fuse(
        fusion, 0, (tokens, tokens), {"s": (net, (said, said))}, torch.zeros(1), frames=8
    )
    assert torch.equal(key[:, :4], said[:, :4]) and torch.equal(key[:, 28:], said[:, 4:])
    assert torch.equal(key[:, 4:28], tokens[:, 4:28]) and torch.equal(key, value)


def test_the_last_frame_can_be_left_alone():
    from ditcache.bridge.capture import fuse

    own, said = torch.randn(1, 32, 2, 24), torch.randn(1, 32, 2, 24)
    net = Identity().make(SHAPE, SHAPE)
    given = {"s": (net, (said, said))}
    key, _ = fuse(rule(leave_last_frame=True), 0, (own, own), given, torch.zeros(1), frames=8)
    assert torch.equal(key[:, 28:], own[:, 28:]) and torch.equal(key[:, :28], said[:, :28])


def test_a_cut_in_mid_run_asks_the_source_anew():
    for driver in ("stream", "store"):
        settings = rule(driver=driver, refresh_every=4)
        sigmas = (0.9, 0.8, 0.7, 0.6)
        found, bridge = run({"c": source(opened(HALF))}, settings, sigmas=sigmas, cut=2)
        assert [s for s, _, branch in bridge.asked if branch == "cond"] == [0, 2]
        assert found[-1].shape[2] == 2


def test_the_target_is_put_back_after_an_exception():
    processors = [block.attn1.processor for block in TARGET.blocks]
    names = set(TARGET.state_dict())
    bridge = Bridge(TARGET, {"c": source(opened(HALF))}, rule(), DeviceStore())
    with pytest.raises(KeyError), bridge.attached(TEXTS):
        assert set(TARGET.state_dict()) == names
        raise KeyError
    assert [block.attn1.processor for block in TARGET.blocks] == processors
    assert not TARGET._forward_pre_hooks
    broken = copy.deepcopy(SOURCE)
    broken.blocks[1].ffn.forward = lambda *a: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run({"c": source(opened(HALF), broken)})
    assert [block.attn1.processor for block in TARGET.blocks] == processors
    assert all("SelfAttention" not in str(type(b.attn1.processor)) for b in broken.blocks)


def test_a_text_of_neither_branch_is_refused():
    bridge = Bridge(TARGET, {"c": source(opened(HALF))}, rule(), DeviceStore())
    with bridge.attached(TEXTS), pytest.raises(DitcacheError, match="neither branch's"):
        Seen(latents(), torch.tensor([500.0]), TEXTS["cond"].clone(), IMAGE).call(TARGET)


def test_renormed_keys_have_the_targets_size():
    from ditcache.bridge.capture import resized

    own, other = torch.randn(1, 6, 2, 24), 3 * torch.randn(1, 6, 2, 24)
    rms = lambda x: x.square().mean((2, 3)).sqrt()  # noqa: E731
    torch.testing.assert_close(rms(resized(other, own)), rms(own))
    assert torch.equal(resized(own, own), own)


def test_another_direction_is_another_projector():
    assert rule().sources == {"wan": "chrono"}
    both = replace(rule(), fusion_direction="bidirectional")
    assert both.sources == {"wan": "chrono", "chrono": "wan"}


def test_a_source_may_be_shown_another_picture():
    """Its channels of the condition are replaced, the noisy ones are not; also after the cut."""
    net, other = opened(Gating(projector_hidden_dim=8)), latents(seed=9)[:, 16:]
    plain, _ = run({"s": source(net)}, sigmas=(0.9,))
    wrong, _ = run({"s": replace(source(net), condition=other)}, sigmas=(0.9,))
    assert differ(plain, wrong)
    right, _ = run({"s": replace(source(net), condition=latents()[:, 16:])}, sigmas=(0.9,))
    assert same(plain, right)
    cut, bridge = run({"s": replace(source(net), condition=other)}, cut=1)
    assert cut[-1].shape[2] == 2 and bridge.forwards == 4
    assert bridge.blocks == 4 * SHAPE.layers
