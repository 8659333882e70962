"""`ditcache ab-test` end to end on the embedded model."""

import errno
import json
import math
from pathlib import Path

import jsonschema
import pytest
import torch
from rows import row
from safetensors.torch import load_file, save_file

import ditcache
from ditcache import cli
from ditcache.ab import cases, runs, sweep
from ditcache.metrics.psnr import psnr
from ditcache.pipeline.denoise import decode_latents

SCHEMA = json.loads((Path(ditcache.__file__).parent / "report/report.schema.json").read_text())
PAIR = "prompt=['a red star moves left','a white cross moves up on a brown background']"


def test_a_run_writes_the_report_in_three_forms(ab):
    report = ab.run("cache=interval", "cache.policy.every=2", PAIR, "seeds=[1,4]")
    jsonschema.validate(report, SCHEMA)
    names = {path.name for path in (ab.folder / "run").iterdir()}
    files = {"report.html", "report.json", "report.md", "config.yaml", ".hydra", "cases"}
    assert names == files | {f"{arm}-00{i}.mp4" for arm in "ab" for i in range(4)}
    assert [(v["prompt"][:5], v["seed"]) for v in report["videos"]] == [
        ("a red", 1), ("a red", 4), ("a whi", 1), ("a whi", 4),
    ]  # fmt: skip
    a, b, fewer, floor = report["rows"]
    assert [r["kind"] for r in report["rows"]] == ["a", "b", "fewer_steps", "noise_floor"]
    assert a["compute_ratio"] == floor["compute_ratio"] == 1
    assert b["compute_ratio"] == pytest.approx(5 / 3)  # steps 0, 2 and 4
    assert fewer["steps"] == 3 and fewer["cases"] == floor["cases"] == 1
    assert floor["psnr"]["mean"] > b["psnr"]["mean"] > 10
    assert b["state_bytes"] > 0 == a["state_bytes"] and b["memory_bytes"] > 1e6
    assert set(b["seconds"]) == {"text", "denoise", "decode", "write"}
    assert b["bound"] == b["compute_ratio"] and b["speedup"]["low"] <= b["speedup"]["median"]
    assert {"key": "policy.every", "a": "-", "b": "2"} in report["difference"]
    assert "ditcache ab-test" in report["command"] and "report.html" in ab.out.replace("\n", "")


def test_arms_take_turns(ab):
    ab.run("cache=interval", PAIR, "controls=1")
    order = [(name, case) for name, case, _ in ab.rendered]
    assert order[:2] == [("none", 0), ("Interval", 0)]
    assert [o for o in order if o[1] == 1] == [("Interval", 1), ("none", 1)]


def test_the_numbers_are_of_raw_frames(ab):
    """Computed again from stored latents, without any file of pixels."""
    report = ab.run("cache=interval", "prompt=a red star moves left")
    stored = [load_file(path)["latents"] for path in ab.folder.glob("outputs/baselines/*")]
    bundle = ditcache.load("tiny")
    frames = [decode_latents(bundle, latents) for latents in stored if latents.shape[2] == 5]
    assert len(frames) == 3  # a and both controls
    floor = row(report, "noise_floor")["psnr"]["mean"]
    pairs = [psnr(x, y) for i, x in enumerate(frames) for y in frames[i + 1 :]]
    assert any(math.isclose(floor, value, rel_tol=1e-9) for value in pairs)


def test_a_against_a_is_identical_and_passes_every_gate(ab):
    report = ab.run(
        "cache=none",
        "gate.min_psnr=99",
        "gate.min_ssim=1",
        "gate.min_worst_psnr=99",
        "steps=5",
        small=False,
    )
    b = row(report)
    assert b["identical"] and b["psnr"] is None and b["ssim"]["worst"] == 1
    assert report["gate"]["passed"] and "identical" in report["gate"]["reasons"][0]
    jsonschema.validate(report, SCHEMA)


def test_a_known_bad_candidate_fails_the_gate_with_code_1(ab):
    bad = ["cache=interval", "cache.policy.every=9", "cache.tail=0", "prompt=a red star"]
    report = ab.run(*bad, "gate.min_psnr=60", "gate.min_speedup=50", code=1)
    assert not report["gate"]["passed"]
    line = ab.err.strip().splitlines()[-1]
    assert line.startswith("ditcache ab-test: gate: min_psnr: asked 60 dB, got ")
    assert "min_speedup: asked 50x" in line
    assert ab.run(*bad, "gate.min_psnr=5")["gate"]["passed"]


def test_units_that_differ_are_marked_as_partly_computed(ab):
    report = ab.run(
        "cache=fbcache",
        "cache.granularity=per_block",
        "cache.policy.threshold=0.3",
        "prompt=a star",
    )
    jsonschema.validate(report, SCHEMA)
    assert set("".join(report["videos"][0]["strips"]["transformer"].values())) <= set("#.+")


def test_two_caches_against_each_other(ab):
    report = ab.run(
        "cache@a=interval", "cache@b=taylorseer", "a.head=1", "b.head=1", "prompt=a red star"
    )
    assert report["arms"] == {"a": {"name": "interval"}, "b": {"name": "taylorseer"}}
    assert not any(name == "none" and case for name, case, _ in ab.rendered)
    keys = {entry["key"] for entry in report["difference"]}
    assert "forecaster._target_" in keys and "policy.every" not in keys


# The shared baseline


def uncached(rendered):
    return [entry for entry in rendered if entry[0] == "none"]


def test_the_baseline_is_rendered_once(ab):
    first = ab.run("cache=interval", PAIR)
    assert len(uncached(ab.rendered)) == 4  # two cases, two controls of the first
    second = ab.run("cache=interval", PAIR, name="again")
    assert not uncached(ab.rendered) and len(ab.rendered) == 2
    assert [v["psnr"] for v in first["videos"]] == [v["psnr"] for v in second["videos"]]
    ab.run("cache=interval", PAIR, "seed=1", name="seed")
    assert len(uncached(ab.rendered)) == 4
    ab.run("cache=interval", PAIR, "baseline.refresh=true", name="refresh")
    assert len(uncached(ab.rendered)) == 4


def test_of_another_process_the_first_is_checked(ab, monkeypatch):
    first = ab.run("cache=interval", PAIR)
    monkeypatch.setattr(runs, "SESSION", "another")
    second = ab.run("cache=interval", PAIR, name="again")
    assert uncached(ab.rendered) == [("none", 0, 5)]
    assert "bit-identical" in second["notes"][0]
    assert [v["psnr"] for v in first["videos"]] == [v["psnr"] for v in second["videos"]]


def test_a_baseline_that_does_not_come_out_again_is_not_used(ab, monkeypatch):
    ab.run("cache=interval", PAIR)
    monkeypatch.setattr(runs, "SESSION", "another")
    rendered = runs.Runner.rendered

    def otherwise(self, case, cache, **more):
        result, frames = rendered(self, case, cache, **more)
        if cache.policy is None:
            result.latents = result.latents + 1e-3
        return result, frames

    monkeypatch.setattr(runs.Runner, "rendered", otherwise)
    report = ab.run("cache=interval", PAIR, name="again")
    assert len(uncached(ab.rendered)) == 5  # the check and all four
    assert "did not come out again" in report["notes"][0]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "of something else"])
def test_a_damaged_baseline_is_seen_and_rendered_again(ab, damage):
    first = ab.run("cache=interval", "prompt=a red star")
    for path in ab.folder.glob("outputs/baselines/*.safetensors"):
        data = bytearray(path.read_bytes())
        if damage == "flipped":
            data[-100] ^= 1
        elif damage == "cut":
            data = data[: len(data) // 2]
        elif damage == "empty":
            data = bytearray()
        if damage == "of something else":
            save_file({"latents": torch.zeros(1, 16, 5, 8, 8)}, path, metadata={"key": "{}"})
        else:
            path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"baseline: .* is damaged"):
        second = ab.run("cache=interval", "prompt=a red star", name="again")
    assert len(uncached(ab.rendered)) == 3
    assert first["videos"][0]["psnr"] == second["videos"][0]["psnr"]


# Interruptions and faults


def interrupt_at(monkeypatch, number, error=KeyboardInterrupt):
    """The case of that number does not come to its end."""
    entry_of = cases.entry_of

    def stop(folder, runner, case):
        if case.index == number:
            raise error
        return entry_of(folder, runner, case)

    monkeypatch.setattr(cases, "entry_of", stop)
    return lambda: monkeypatch.setattr(cases, "entry_of", entry_of)


def test_an_interrupted_run_says_how_to_go_on_and_does(ab, monkeypatch):
    words = ["cache=interval", "prompts=demo"]
    whole = ab.run(*words, name="whole")
    undo = interrupt_at(monkeypatch, 2)
    assert ab.run(*words, "seed=0", code=130) is None
    assert "after 2 of 4 cases" in ab.err and f"hydra.run.dir={ab.folder / 'run'}" in ab.err
    undo()
    report = ab.run(*words, "seed=0")
    assert {case for _, case, _ in ab.rendered} == {2, 3}
    assert [v["psnr"] for v in report["videos"]] == [v["psnr"] for v in whole["videos"]]
    ab.run(*words, "seed=0", "cache.policy.every=2")
    assert {case for name, case, _ in ab.rendered if name == "Interval"} == {0, 1, 2, 3}


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(ab, monkeypatch):
    def full(path, frames, **more):
        path.with_name(f".{path.stem}.partial{path.suffix}").write_bytes(b"half")
        path.with_name(f".{path.stem}.partial{path.suffix}").unlink()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(cases, "write_mp4", full)
    ab.run("cache=interval", "prompt=a red star", code=2)
    assert "No space left on device" in ab.err and len(ab.err.strip().splitlines()) == 1
    left = {path.name for path in (ab.folder / "run").rglob("*") if path.is_file()}
    assert not any(name.endswith((".mp4", ".html")) or "partial" in name for name in left)


# Sweeps


def sweep_of(ab, *arguments, code=0, values="2,3,4"):
    words = ["ab-test", "-m", "steps=5", "controls=1", "upscale=1", "cache.head=1", *arguments]
    words += ["cache=interval", f"cache.policy.every={values}", PAIR]
    ab.rendered.clear()
    assert cli.run([*words, f"hydra.sweep.dir={ab.folder / 'sweep'}"]) == code
    return ab.folder / "sweep"


def test_a_sweep_pays_for_the_baseline_once_and_equals_single_runs(ab):
    folder = sweep_of(ab)
    assert len([e for e in uncached(ab.rendered) if e[2] == 5]) == 3  # two cases, the noise floor
    rows = {
        r["setting"]: r for r in json.loads(json.dumps(sweep.rows_of(sweep.read_reports(folder))))
    }
    for every in (2, 3, 4):
        single = ab.run("cache=interval", f"cache.policy.every={every}", PAIR, name=f"one{every}")
        swept, b = rows[f"cache.policy.every={every}"], row(single)
        assert swept["psnr"] == b["psnr"]["mean"] and swept["ssim"] == b["ssim"]["mean"]
        assert swept["compute_ratio"] == b["compute_ratio"]
    lines = (folder / "sweep.csv").read_text().splitlines()
    assert len(lines) == 4 and lines[0].startswith("job,setting,compute_ratio,speedup,psnr")
    page = json.loads((folder / "sweep.json").read_text())
    jsonschema.validate(page, SCHEMA)
    assert sum(p["kind"] == "sweep" for p in page["points"]) == 3
    assert any(p["front"] for p in page["points"] if p["kind"] == "sweep")
    assert (folder / "report.html").is_file()


def test_a_failed_job_does_not_lose_the_others(ab):
    folder = sweep_of(ab, values="2,0,3", code=2)
    assert len(json.loads((folder / "sweep.json").read_text())["points"]) >= 2
    assert not (folder / "1" / "report.json").exists()


def test_a_killed_sweep_goes_on(ab, monkeypatch):
    folder = ab.folder / "sweep"
    entry_of, made = cases.entry_of, []

    def stop(run_folder, runner, case):
        made.append(case.index)
        if len(made) == 4:  # in the middle of the second job
            raise KeyboardInterrupt
        return entry_of(run_folder, runner, case)

    monkeypatch.setattr(cases, "entry_of", stop)
    sweep_of(ab, code=130)
    monkeypatch.setattr(cases, "entry_of", entry_of)
    sweep_of(ab)
    again = [(name, case) for name, case, _ in ab.rendered if name == "Interval"]
    assert len(again) == 3, "finished cases were rendered again"
    assert len(sweep.read_reports(folder)) == 3
