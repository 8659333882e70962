"""What a bridge is compared with in whole runs: mixes leave nothing behind, run no forward that they
do not need, and go with the bridge's file.
"""

import pytest
import torch
from random_checkpoints import small_transformer

from ditcache.bridge.capture import Seen
from ditcache.bridge.controls import Alone, OutputAverage, TimestepSwitch, WeightAverage
from ditcache.bridge.controls_file import controls_path, load_controls, save_controls
from ditcache.bridge.mix import Mix
from ditcache.bridge.run import Source
from ditcache.bridge.saved import ZOO
from ditcache.bridge.students import LowRankUpdate, Router
from ditcache.bridge.verdict import Verdict
from ditcache.errors import DitcacheError

WAN, CHRONO = "WanTransformer3DModel", "ChronoEditTransformer3DModel"
TEXTS = {name: torch.randn(1, 512, 64) for name in ("cond", "uncond")}
THEIRS = {name: torch.randn(1, 512, 64) for name in ("cond", "uncond")}
IMAGE = torch.randn(1, 5, 16)


def model(cls=WAN, seed=0):
    torch.manual_seed(seed)
    return small_transformer(cls, 36, 16).eval().requires_grad_(False)


TARGET, SOURCE = model(WAN, 1), model(CHRONO, 2)
OTHER = Source(SOURCE, None, THEIRS, IMAGE)


def seen(sigma, text):
    latents = torch.randn(1, 36, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return Seen(latents, torch.tensor([1000.0 * sigma]), text, IMAGE)


@torch.no_grad()
def run(student, sigmas=(0.9, 0.3)):
    mix, found = Mix(TARGET, student, OTHER), []
    with mix.attached(TEXTS):
        for sigma in sigmas:
            found += [seen(sigma, TEXTS[branch]).call(TARGET) for branch in ("cond", "uncond")]
    return mix, found


@torch.no_grad()
def plain(transformer, texts, sigmas=(0.9, 0.3)):
    branches = ("cond", "uncond")
    return [seen(s, texts[branch]).call(transformer) for s in sigmas for branch in branches]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_source_alone_runs_no_forward_of_the_target():
    mix, found = run(Alone(source=True))
    assert same(found, plain(SOURCE, THEIRS))
    assert (mix.forwards, mix.own) == (4, 0)


def test_a_switch_runs_one_model_at_each_level():
    mix, found = run(TimestepSwitch(0.6, source_above=True))
    assert same(found, [*plain(SOURCE, THEIRS)[:2], *plain(TARGET, TEXTS)[2:]])
    assert (mix.forwards, mix.own) == (2, 2)
    _, never = run(TimestepSwitch(2.0, source_above=True))
    assert same(never, plain(TARGET, TEXTS))


def test_averages_and_routers_run_both():
    mix, found = run(OutputAverage(0.25))
    mixed = [a + 0.25 * (b - a) for a, b in zip(plain(TARGET, TEXTS), plain(SOURCE, THEIRS))]  # noqa: B905
    for one, wanted in zip(found, mixed, strict=True):
        torch.testing.assert_close(one, wanted)
    assert (mix.forwards, mix.own) == (4, 4)
    _, closed = run(Router(16))
    assert same(closed, plain(TARGET, TEXTS))


def test_lora_and_weight_average_take_the_target_alone():
    lora = LowRankUpdate(TARGET, 2)
    mix, closed = run(lora)
    assert same(closed, plain(TARGET, TEXTS)) and (mix.forwards, mix.own) == (0, 4)
    torch.nn.init.normal_(lora.pairs[0][1].weight)
    before = plain(TARGET, TEXTS)
    assert not same(run(lora)[1], before)
    assert not same(run(WeightAverage(SOURCE, 0.5))[1], before)
    assert same(plain(TARGET, TEXTS), before)


@pytest.mark.parametrize("student", [OutputAverage(0.5), WeightAverage(SOURCE, 0.5)])
def test_the_target_is_put_back_after_an_exception(student):
    before = plain(TARGET, TEXTS)
    with pytest.raises(RuntimeError, match="stop"), Mix(TARGET, student, OTHER).attached(TEXTS):
        raise RuntimeError("stop")
    assert same(plain(TARGET, TEXTS), before)
    assert not TARGET._forward_hooks
    run(student)  # and it can be attached again


def test_a_text_of_neither_branch_is_refused():
    with (
        pytest.raises(DitcacheError, match="neither branch's"),
        Mix(TARGET, OutputAverage(0.5), OTHER).attached(TEXTS),
    ):
        seen(0.5, torch.randn(1, 512, 64)).call(TARGET)


def test_controls_go_with_the_bridge(tmp_path):
    torch.manual_seed(5)
    router, lora = Router(16), LowRankUpdate(TARGET, 3)
    for parameter in (*router.parameters(), *lora.parameters()):
        torch.nn.init.normal_(parameter, 0, 0.3)
    kept = {
        "target alone": Alone(),
        "output averaging": OutputAverage(0.25),
        "timestep switching": TimestepSwitch(0.6, source_above=False),
        "weight average": WeightAverage(SOURCE, 0.1),
        "router": router,
        "lora": lora,
    }
    bridge = tmp_path / "bridge.safetensors"
    bridge.write_bytes(b"a bridge")
    path = controls_path(bridge, "wan")
    assert load_controls(path, bridge, TARGET, SOURCE) == ({}, [])
    save_controls(path, bridge, kept, [Verdict("P1", "is it used", True, ("run 0: -1",))])
    found, known = load_controls(path, bridge, TARGET, SOURCE)
    assert list(found) == [
        "output averaging", "timestep switching", "weight average", "output router",
        "LoRA of equal size",
    ]  # fmt: skip
    assert known == ["P1 PASS: is it used (run 0: -1)"]
    for old, new in (
        ("router", "output router"), ("lora", "LoRA of equal size"),
        ("output averaging",) * 2, ("timestep switching",) * 2, ("weight average",) * 2,
    ):  # fmt: skip
        assert same(run(kept[old])[1], run(found[new])[1]), old
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"another bridge")
    assert load_controls(path, other, TARGET, SOURCE) == ({}, [])
    path.write_bytes(b"nothing")
    with pytest.raises(DitcacheError, match="holds no controls"):
        load_controls(path, bridge, TARGET, SOURCE)


def test_controls_of_embedded_bridges_have_a_place_of_their_own():
    assert controls_path(ZOO / "x.safetensors", "wan") == ZOO / "controls" / "x.safetensors"
