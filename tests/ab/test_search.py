"""The target search: on cases it has not seen, or an honest no."""

import json
from types import SimpleNamespace

import pytest
from rows import row

from ditcache.ab import search

optuna = pytest.importorskip("optuna")
WORDS = ["prompts=demo", "seeds=[0,1]", "steps=6", "controls=1", "search.trials=4"]


@pytest.mark.parametrize(
    ("policy", "target"),
    [
        ("cache=taylorseer", "search.target_psnr=26"),
        ("cache=fbcache", "search.target_ssim=0.9"),
        ("cache=seacache", "search.target_psnr=26"),
    ],
)
def test_a_target_is_met_on_cases_it_has_not_seen_or_it_says_so(ab, policy, target):
    report = ab.run(policy, target, *WORDS, small=False)
    found, b = report["search"], row(report)
    name, asked = next(iter(found["target"].items()))
    reached = b["identical"] or b[name]["mean"] >= asked
    assert found["met"] == reached
    assert ("NOT met" in found["text"]) == (not reached)
    assert found["text"] in report["notes"] and found["compute_ratio"] == b["compute_ratio"]
    assert len(report["videos"]) == 4
    trials = json.loads((ab.folder / "run/search.json").read_text())["trials"]
    assert 1 <= len(trials) <= 4 and all(len(t["quality"]) == 4 for t in trials)
    good = [t for t in trials if search.Trial(**t).rank(settings_of(target))[0]]
    if good:
        best = max(good, key=lambda t: t["compute_ratio"])
        assert found["values"] == best["values"]
    else:
        assert "no setting held the target" in found["text"]


def settings_of(words):
    from ditcache.ab.settings import SearchSettings

    name, value = words.removeprefix("search.").split("=")
    return SearchSettings(**{name: float(value)})


def test_what_cannot_be_is_said(ab):
    report = ab.run(
        "cache=taylorseer", "search.target_psnr=99", "prompts=demo", "steps=6", "search.trials=2",
        "search.space={policy.every:[4,6],head:[1,2]}", small=False,
    )  # fmt: skip
    assert not report["search"]["met"]
    assert "NOT met; no setting held the target where it was searched" in report["search"]["text"]


def test_a_search_goes_on_where_it_stopped(ab, monkeypatch):
    words = ["cache=interval", "search.target_psnr=20", "prompts=demo", "steps=6"]
    run_trial, calls = search.run_trial, []

    def stop(runner, cfg, values, seen):
        calls.append(values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_trial(runner, cfg, values, seen)

    monkeypatch.setattr(search, "run_trial", stop)
    ab.run(*words, "search.trials=4", small=False, code=130)
    assert "interrupted after 2 trials" in ab.err
    monkeypatch.setattr(search, "run_trial", lambda *a: calls.append(a[2]) or run_trial(*a))
    calls.clear()
    ab.run(*words, "search.trials=4", small=False)
    assert 1 <= len(calls) <= 2


def test_a_search_with_a_bridge_searches_the_bridged_model(monkeypatch):
    import numpy as np
    import torch

    from ditcache.ab.results import Result

    asked = []

    class Runner:
        settings = SimpleNamespace(
            bridge="some", a="none", search=SimpleNamespace(target_ssim=None)
        )

        def arm(self, case, cache, *, bridged=False):
            asked.append((cache, bridged))
            result = Result(torch.zeros(1), 4, {"denoise": 1.0}, 8, 16, 0, 0)
            return result, np.full((1, 8, 8, 3), 0.5)

    monkeypatch.setattr(search, "cache_with", lambda cfg, values: "cached")
    trial = search.run_trial(Runner(), None, {}, ["case"])
    assert asked == [("none", False), ("cached", True)] and trial.compute_ratio == 2
