"""Fits and plans on made-up numbers, and the command on the embedded model."""

import itertools
import json

import numpy as np
import pytest
import torch

import ditcache
from ditcache import cli
from ditcache.cache.calibration import load_calibration
from ditcache.calibrate.fit import fit_polynomial, mean_ratios
from ditcache.calibrate.measure import Measured, measure
from ditcache.calibrate.plan import dampings, error_at, error_of, make_plan, shortest_path
from ditcache.pipeline.denoise import denoise
from ditcache.pipeline.inputs import draw_inputs
from ditcache.pipeline.text import encode_text


def gram_of(residuals, window):
    """[T, W, W] of effects R_earlier - R_own, as if the layers behind the blocks were linear."""
    steps = len(residuals)
    gram = np.zeros((steps, window, window))
    for step in range(1, steps):
        count = min(step, window)
        effects = np.stack([residuals[step - 1 - i] - residuals[step] for i in range(count)])
        gram[step, :count, :count] = effects @ effects.T
    return gram


@pytest.fixture
def residuals():
    """[T, D]: a smooth path with a restless start."""
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, 9)[:, None]
    return np.sin(3 * t + rng.normal(size=(1, 12))) + 0.4 * np.exp(-9 * t) * rng.normal(
        size=(9, 12)
    )


def test_the_path_is_the_best_of_all_masks(residuals):
    gram, gains = gram_of(residuals, 8).tolist(), list(np.linspace(1, 2, 9))
    for compute in (3, 4, 6):
        found = shortest_path(gram, gains, [0], compute)
        assert sum(found) == compute and found[0] and found[-1]
        costs = {}
        for middle in itertools.combinations(range(1, 8), compute - 2):
            mask = [step in (0, 8, *middle) for step in range(9)]
            costs[tuple(mask)] = error_of(gram, gains, mask, dampings(gram, mask, [0]), [0])
        assert costs[tuple(found)] == pytest.approx(min(costs.values()))


def test_the_damping_is_the_best_one(residuals):
    gram = gram_of(residuals, 8).tolist()
    mask = [step in (0, 2, 4, 8) for step in range(9)]
    best = dampings(gram, mask, [0])
    for place, (step, anchors) in enumerate([(1, (0,)), (3, (2, 0)), (5, (4, 2)), (6, (4, 2))]):
        errors = [error_at(gram, anchors, step, best[place] + shift) for shift in (-0.1, 0, 0.1)]
        assert errors[1] == min(errors)
        if len(anchors) == 2:
            share = best[place] * (step - anchors[0]) / (anchors[0] - anchors[1])
            near, far = residuals[anchors[0]], residuals[anchors[1]]
            forecast = near + share * (near - far)
            assert errors[1] == pytest.approx(((forecast - residuals[step]) ** 2).sum())


def test_a_straight_path_needs_no_damping_and_has_no_error():
    line = np.arange(9)[:, None] * np.ones((1, 5))
    plan = make_plan(gram_of(line, 8)[None], [1.0] * 9, np.ones(1), [0], 4)
    after = plan.mask.index(True, 1)
    assert plan.damping[after - 1 :] == pytest.approx([1.0] * len(plan.damping[after - 1 :]))


def test_a_plan_computes_the_first_step_of_every_expert_and_never_looks_behind_it(residuals):
    plan = make_plan(gram_of(residuals, 8)[None], [1.0] * 9, np.ones(1), [0, 5], 4)
    assert sum(plan.mask) == 4 and plan.mask[5]
    assert not plan.mask[6] and plan.damping[plan.marks[:6].count(".")] == 0.0


def test_no_way_is_said():
    with pytest.raises(ValueError, match="no way to compute 2 of 9 steps within a window of 3"):
        make_plan(np.ones((1, 9, 3, 3)), [1.0] * 9, np.ones(1), [0], 2)


def test_the_polynomial_is_found_again():
    truth, signal = [3000.0, -400.0, 20.0, 1.5, 0.01], np.linspace(0.0, 0.12, 30)
    change = list(np.polyval(truth, signal))
    run = Measured(torch.zeros(1), [], [0], {"cond": [float("nan"), *change[1:]]}, {}, np.zeros(1))
    fit = fit_polynomial(list(signal), [run])
    assert fit.coefficients == pytest.approx(truth, rel=1e-6) and fit.r2 == pytest.approx(1.0)


def test_the_ratios_are_those_of_the_residuals(bundle):
    text = encode_text(bundle, "a red star moves left", negative_prompt="", guidance=4.0)
    inputs = draw_inputs(bundle, text, height=64, width=64, num_frames=17, seed=1)
    sampling = {"steps": 5, "guidance": 4.0, "guidance_low": None, "shift": None}
    kept = []
    blocks = bundle.pipe.transformer.blocks
    handles = [
        blocks[0].register_forward_pre_hook(lambda module, args: kept.append(args[0])),
        blocks[-1].register_forward_hook(lambda module, args, out: kept.append(out)),
    ]
    plain = denoise(bundle, inputs, **sampling)
    for handle in handles:
        handle.remove()
    seen = []
    run = measure(bundle, inputs, window=3, sampling=sampling, on_step=lambda s: seen.append(s))
    assert torch.equal(run.latents, plain) and len(seen) == 5 and run.starts == [0]
    pairs = zip(kept[0::4], kept[1::4], strict=True)  # of cond
    sizes = torch.stack([after - before for before, after in pairs]).norm(dim=-1)
    ratios, _ = mean_ratios([run])["cond"]
    assert ratios[1:] == pytest.approx((sizes[1:] / sizes[:-1]).mean((1, 2)).tolist(), rel=1e-5)
    assert bundle.pipe.transformer.blocks is blocks


def test_the_gram_predicts_what_a_reuse_does(bundle):
    """Hold at one step: the guided output's error of a real cached run."""
    text = encode_text(bundle, "a red star moves left", negative_prompt="", guidance=4.0)
    inputs = draw_inputs(bundle, text, height=64, width=64, num_frames=17, seed=1)
    sampling = {"steps": 6, "guidance": 4.0, "guidance_low": None, "shift": None}
    velocities = {}

    def keep(name):
        return lambda step: velocities.setdefault(name, []).append(step.velocity)

    run = measure(bundle, inputs, window=4, sampling=sampling, on_step=keep("plain"))
    ditcache.enable_cache(bundle, "scm", preset=None, compute=[3, 9], skip=[1], forecaster="hold")
    denoise(bundle, inputs, **sampling, callbacks=[keep("held")])
    ditcache.disable_cache(bundle)
    error = float((velocities["held"][3] - velocities["plain"][3]).double().square().sum())
    assert run.gram[3, 0, 0] == pytest.approx(error, rel=1e-3)


def test_the_command_writes_what_generate_takes(tmp_path, capsys):
    folder = tmp_path / "calibrated"
    arguments = ["prompt=['a red star moves left','a blue circle moves up']", "steps=8"]
    arguments += ["computes=[3,5]", "probe_prompts=1", "probes=3", f"hydra.run.dir={folder}"]
    assert cli.run(["calibrate", *arguments]) == 0
    assert "planned, compute=5" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} >= {
        "calibration.yaml", "calibration.png", "metrics.json", "config.yaml",
    }  # fmt: skip
    known = load_calibration(str(folder / "calibration.yaml"))
    assert set(known.teacache) == {"e", "e0"} and len(known.magcache["cond"]) == 8
    assert {n: p["mask"].count("#") for n, p in known.planned["plans"].items()} == {3: 3, 5: 5}
    for cache in ("planned", "teacache", "magcache"):
        run = tmp_path / cache
        choice = [f"cache={cache}", f"model.calibration={folder}/calibration.yaml", "steps=8"]
        choice += ["cache.policy.compute=5"] if cache == "planned" else ["cache.head=1"]
        assert cli.run(["generate", *choice, f"hydra.run.dir={run}"]) == 0
        rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
        if cache == "planned":
            marks = known.planned["plans"][5]["mask"]
            for branch in ("cond", "uncond"):
                done = "".join("#" if r["computed"] else "." for r in rows if r["branch"] == branch)
                assert done == marks


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("steps=3", "steps: must be >= 4, got 3"),
        ("window=1", "window: must be >= 2, got 1"),
        ("computes=[24]", "computes: must be from 4 to 23, got 24"),
        ("probe_prompts=0", "probe_prompts: must be >= 1, got 0"),
    ],
)
def test_bad_values_are_one_line(argument, message, tmp_path, capsys):
    assert cli.run(["calibrate", argument, f"hydra.run.dir={tmp_path}/run"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_experts_can_be_calibrated(checkpoints, tmp_path):
    arguments = ["model=wan2.2_t2v", f"model.path={checkpoints['wan2.2_t2v']}", "prompt=x"]
    arguments += ["height=32", "width=32", "num_frames=5", "steps=8", "model.dtype=float32"]
    arguments += ["model.device=cpu", "computes=[5]", f"hydra.run.dir={tmp_path}/run"]
    assert cli.run(["calibrate", *arguments]) == 0
    plan = load_calibration(str(tmp_path / "run" / "calibration.yaml")).planned
    choice = ["cache=planned", "cache.policy.compute=5"]
    choice += [f"model.calibration={tmp_path}/run/calibration.yaml"]
    again = [a for a in arguments if not a.startswith(("computes", "hydra"))]
    assert cli.run(["generate", *again, *choice, f"hydra.run.dir={tmp_path}/out"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/steps.jsonl").read_text().splitlines()]
    done = "".join("#" if r["computed"] else "." for r in rows if r["branch"] == "cond")
    assert done == plan["plans"][5]["mask"]
