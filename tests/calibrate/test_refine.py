"""Plans that rendering makes better: on a made-up renderer whose best answer is known, and on the
embedded model.
"""

import json

import numpy as np
import pytest
import torch

from ditcache import cli
from ditcache.cache.calibration import load_calibration
from ditcache.cache.forecasters.fitted import Fitted
from ditcache.cache.policies.planned import Planned
from ditcache.calibrate.measure import render
from ditcache.calibrate.plan import Plan
from ditcache.calibrate.refine import decibel, least_squares, line_weights, neighbours, refine
from ditcache.errors import ConfigError
from ditcache.pipeline.denoise import denoise
from ditcache.pipeline.inputs import draw_inputs
from ditcache.pipeline.text import encode_text

SAMPLING = {"steps": 8, "guidance": 4.0, "guidance_low": None, "shift": None}


def test_the_fit_is_the_best_change_for_the_mean_of_decibels():
    rng = np.random.default_rng(0)
    effects, off = rng.normal(size=(3, 4, 9)), rng.normal(size=(3, 9)) * [[1], [5], [0.2]]
    products = np.einsum("pnd,pmd->pnm", effects, effects)
    slopes, errors = np.einsum("pnd,pd->pn", effects, off), (off**2).sum(1)

    def objective(x):
        left = ((off + np.einsum("n,pnd->pd", x, effects)) ** 2).sum(1)
        return np.log(left).mean()

    found = least_squares(products, slopes, errors)
    assert objective(found) < objective(np.zeros(4)) - 0.1
    for place in range(4):  # the ridge leaves it a little short of the optimum, not beyond it
        shorter = found * np.where(np.arange(4) == place, 0.5, 1.0)
        assert objective(found) < objective(shorter) + 0.02


def test_neighbours_leave_the_experts_first_steps_and_the_last_alone():
    mask = [mark == "#" for mark in "#..#.#.#"]
    ways = {way for way, _ in neighbours(mask, [0, 5])}
    assert ways == {(3, 2), (3, 4)}
    assert all(sum(one) == sum(mask) for _, one in neighbours(mask, [0, 5]))


def made_up(target_mask, target_weights):
    """A renderer: latents are off by how far the plan is from a known best one."""

    def run(mask, weights):
        moved = float(sum(a != b for a, b in zip(mask, target_mask, strict=True)))
        rows = [row + [0.0] * (3 - len(row)) for row in weights]
        best = [row + [0.0] * (3 - len(row)) for row in target_weights]
        off = torch.tensor(rows).flatten() - torch.tensor(best).flatten()
        return [torch.cat([torch.ones(3), torch.tensor([moved]), scale * off]) for scale in (1, 2)]

    return run


def test_a_better_neighbour_and_better_weights_are_found():
    start = [mark == "#" for mark in "#.#..#.#"]
    best = [mark == "#" for mark in "#..#.#.#"]
    weights = [[1.0], [1.0], [1.5, -0.5], [1.2, 0.1, -0.3]]
    run = made_up(best, weights)
    references = [torch.cat([torch.ones(3), torch.zeros(13)]) for _ in range(2)]
    plan = Plan(start, [0.0] * 4, -10.0)
    found = refine(plan, np.ones((2, 8, 7, 7)), [0], references, run)
    assert found.mask == best and found.weights is not None
    before, after = found.rendered
    assert after < before - 3
    assert [len(row) for row in found.weights] == [1, 1, 2, 3]
    assert after == pytest.approx(decibel(run(found.mask, found.weights), references))


def test_a_plan_that_nothing_improves_stays():
    mask = [mark == "#" for mark in "#.#..#.#"]
    weights = line_weights(mask, [0.0] * 4, [0])
    references = [torch.cat([torch.ones(3), torch.zeros(13)]) for _ in range(2)]
    plan = Plan(mask, [0.0] * 4, -10.0)
    found = refine(plan, np.ones((2, 8, 7, 7)), [0], references, made_up(mask, weights))
    assert found.mask == mask and found.weights == weights
    assert found.rendered[0] == found.rendered[1]


def test_line_weights_render_like_dampings(bundle):
    """The same plan in both spellings, and hold by weights is hold."""
    text = encode_text(bundle, "a red star moves left", negative_prompt="", guidance=4.0)
    inputs = draw_inputs(bundle, text, height=64, width=64, num_frames=17, seed=1)
    marks, damping = "##.#..##", [0.7, 0.4, -0.2]
    mask = [mark == "#" for mark in marks]
    weights = line_weights(mask, damping, [0])

    def go(*args):
        return render(bundle, inputs, *args, sampling=SAMPLING, on_step=lambda step: None)

    policy = Planned(compute=5)
    policy.plan = {"mask": marks, "damping": damping, "sigmas": []}
    import ditcache

    cache = ditcache.enable_cache(bundle, policy, Fitted())
    damped = denoise(bundle, inputs, **SAMPLING)
    ditcache.disable_cache(bundle)
    assert cache.settings.forecaster.tensors == 2
    weighted = go(mask, weights)
    scale = damped.abs().mean()
    assert (weighted - damped).abs().max() < 1e-3 * scale
    other = go(mask, [[1.0], *weights[1:]])
    assert (other - damped).abs().max() > 1e-3 * scale


def refined_policy(**plan):
    policy = Planned(compute=plan["mask"].count("#"))
    policy.plan = {"sigmas": [], **plan}
    return policy


def test_weights_hold_only_behind_the_steps_the_plan_computes():
    policy = refined_policy(mask="##.#.", weights=[[1.5, -0.5], [1.2, 0.0, -0.2]])
    assert policy.reach == 3
    assert policy.weights(2, [1, 0]) == [1.5, -0.5]
    assert policy.weights(4, [3, 1, 0]) == [1.2, 0.0, -0.2]
    assert policy.weights(4, [2, 1, 0]) is None and policy.weights(3, [1, 0]) is None
    assert policy.damping(4) == 1.0


def test_weights_missing_for_a_skipped_step_are_said(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "planned: {steps: 3, sigmas: [1, 1, 1], plans: {2: {mask: '#.#', weights: []}}}\n"
    )
    with pytest.raises(ConfigError, match="needs weights for every skipped step"):
        load_calibration(str(path))


def test_the_command_refines_and_generate_takes_it(tmp_path):
    folder, prompts = tmp_path / "calibrated", "prompt=['a red star moves left']"
    arguments = [prompts, "steps=6", "computes=[3,4]", "refine=[4]", "refine_prompts=1"]
    arguments += ["probe_prompts=1", "probes=2", f"hydra.run.dir={folder}"]
    assert cli.run(["calibrate", *arguments]) == 0
    plans = load_calibration(str(folder / "calibration.yaml")).planned["plans"]
    assert "weights" not in plans[3] and len(plans[4]["weights"]) == 2
    before, after = json.loads((folder / "metrics.json").read_text())["refined"]["4"]
    assert after < before  # on the prompt it was fitted to
    run = tmp_path / "run"
    choice = ["cache=planned", "cache.policy.compute=4", "steps=6", prompts]
    choice += [f"model.calibration={folder}/calibration.yaml", f"hydra.run.dir={run}"]
    assert cli.run(["generate", *choice]) == 0
    rows = [json.loads(row) for row in (run / "steps.jsonl").read_text().splitlines()]
    done = "".join("#" if row["computed"] else "." for row in rows if row["branch"] == "cond")
    assert done == plans[4]["mask"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("refine=[40]", "refine: must be among the planned"),
        ("refine_prompts=0", "refine_prompts: must be >= 1, got 0"),
        ("refine_prompts=5", "refine_prompts: has no effect without refine"),
    ],
)
def test_bad_values_are_one_line(argument, message, tmp_path, capsys):
    assert cli.run(["calibrate", argument, f"hydra.run.dir={tmp_path}/run"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
