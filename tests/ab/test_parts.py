"""The parts of ab-test on their own."""

import math

import pytest
from rows import row

from ditcache import cli
from ditcache.ab.collect import middle, spread
from ditcache.ab.gate import judge
from ditcache.ab.results import canonical, digest, plain
from ditcache.ab.runs import strips_of
from ditcache.ab.settings import GateSettings
from ditcache.cache.policies.interval import Interval
from ditcache.cache.settings import CacheSettings
from ditcache.cache.trace import Decision, Trace
from ditcache.report.pareto import front, mark_front
from ditcache.store.base import Key
from ditcache.store.device import DeviceStore


def decision(step, computed, branch="cond", expert="transformer", unit=0):
    return Decision(step, expert, branch, unit, computed, "policy", None, 4, 0)


def test_a_strip_has_a_mark_per_step_of_the_run():
    decisions = [decision(0, True), decision(1, False), decision(1, True, unit=1)]
    decisions += [decision(0, True, "uncond"), decision(1, False, "uncond")]
    decisions += [decision(2, False, expert="transformer_2")]
    assert strips_of(Trace(decisions), 3) == {
        "transformer": {"cond": "#+ ", "uncond": "#. "},
        "transformer_2": {"cond": "  ."},
    }


def test_the_front_is_what_nothing_beats():
    assert front([(1.0, 50.0), (2.0, 40.0), (1.5, 39.0), (3.0, 30.0), (3.0, 20.0)]) == {0, 1, 3}
    points = [
        {"kind": "b", "speedup": 2.0, "psnr": 40.0},
        {"kind": "noise_floor", "speedup": 1.0, "psnr": 90.0},
        {"kind": "fewer_steps", "speedup": 1.0, "psnr": None},
        {"kind": "sweep", "speedup": 1.9, "psnr": 39.0},
    ]
    assert [p["front"] for p in mark_front(points)] == [True, False, True, False]


def test_equal_videos_are_left_out_of_the_mean_psnr():
    assert spread("psnr", [math.inf, 30.0, 40.0])["mean"] == 35.0
    assert spread("psnr", [math.inf]) is None and spread("lpips", [None]) is None
    assert spread("temporal", [0.1, 0.3])["worst"] == 0.3
    assert middle([1.0, 2.0, 9.0])["median"] == 2.0


def report_with(**b):
    found = {"kind": "b", "identical": False, "speedup": {"median": 1.5}, **b}
    return {"rows": [{"kind": "a"}, found]}


def test_the_gate():
    report = report_with(psnr={"mean": 35.0, "worst": 20.0}, ssim={"mean": 0.9, "worst": 0.8})
    assert row(report)["psnr"]["mean"] == 35.0
    assert judge(GateSettings(), report) is None
    assert judge(GateSettings(min_psnr=35.0, min_speedup=1.5), report)["passed"]
    verdict = judge(GateSettings(min_psnr=30.0, min_worst_psnr=25.0), report)
    assert not verdict["passed"] and "missed" in verdict["reasons"][1]
    assert not judge(GateSettings(min_ssim=0.95), report)["passed"]
    nothing = report_with(psnr=None, ssim=None)
    assert not judge(GateSettings(min_psnr=1.0), nothing)["passed"], "not known is not reached"


def test_a_component_as_data_tells_classes_and_values_apart():
    two, three = (CacheSettings(Interval(every=n)) for n in (2, 3))
    assert plain(two)["policy"] == {"class": "Interval", "every": 2}
    assert plain(two)["forecaster"]["class"] == "Hold"
    assert digest(plain(two)) != digest(plain(three)) and digest(plain(two)) == digest(plain(two))
    store = DeviceStore()
    before = digest(plain(store))
    store.get(Key(0, "transformer", "cond", 0, "x"))
    assert store.misses == 1 and digest(plain(store)) == before, "what it keeps is no setting"
    assert canonical({"b": 1, "a": 2}) == canonical({"a": 2, "b": 1})


WRONG = {
    "gate.min_ssim=2": "gate.min_ssim: must be between 0 and 1, got 2.0",
    "gate.min_psnr=-3": "gate.min_psnr: must be > 0, got -3.0",
    "seeds=[]": "seeds: needs numbers >= 0, got []",
    "controls=0": "controls: must be >= 1, got 0",
    "search.target_psnr=30 search.target_ssim=0.9": "search.target_ssim: one target at a time",
    "search.target_psnr=30 prompts=one": "search: needs 4 cases or more",
    "search.target_speedup=1": "search.target_speedup: must be > 1",
    "search.space={policy.every:[5,2]}": "search.space.policy.every: needs [low, high]",
    "search.target_psnr=30 cache=none": "search: needs a policy to search over",
    "search.target_psnr=30 search.space={policy.evry:[2,5]}": "search.space: cache has no value 'policy.evry'",
    "search.target_psnr=30 cache=cfg_delta": "search.space: no usual one for this policy",
    "metrics.lpips=/no/such/file": "metrics.lpips: ",
    "cache@b=teecache": "cache: no option 'teecache'",
    "a.head=3": "a.head: no such key",
    "cache@a=interval a.cfg.every=2": "a.cfg",
    "baseline.fodler=x": "baseline.fodler: no such key. Did you mean 'folder'?",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_settings_are_one_line_before_anything_is_loaded(
    words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ditcache.models.load.load", lambda *a: pytest.fail("loads a model"))
    assert cli.run(["ab-test", *words.split()]) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and WRONG[words] in err
    assert not list(tmp_path.iterdir())
