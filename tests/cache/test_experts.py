"""Wan2.2's two experts: masks go by the step of the whole run, and nothing of the first expert is
left when the second works.
"""

import pytest
import torch
from by_hand import cached
from test_exactness import FULL, SKIPPING

import ditcache
from ditcache.cache.policies.base import Policy
from ditcache.cache.schedule import schedule_reader
from ditcache.errors import ConfigError, DitcacheError

STEPS, HIGH = 20, 6  # of the run, of the high-noise expert
KNOBS = {  # that skip something in each expert
    **SKIPPING,
    "interval": {"every": 3},
    "taylorseer": {"every": 3},
    "magcache": {"threshold": 0.3, "max_run": 2, "retention": 0.2, "ratios": [0.95] * STEPS},
    "planned": {"compute": 9},
    "teacache": {"rel_l1_thresh": 1.2, "coefficients": [1.0, 0.0]},
    "fbcache": {"threshold": 2.0},
    "dbcache": {"threshold": 2.0, "back": 1},
    "seacache": {"threshold": 1.5},
    "dicache": {"threshold": 0.5},
    "easycache": {"threshold": 0.4},
}
PLAN = "#..#.##..#..#..#.#.#"


@pytest.fixture(scope="module")
def two(checkpoints):
    """A pipeline with two random experts of three blocks, split after the sixth of twenty steps."""
    pipe = ditcache.load(
        "wan2.2_t2v", path=str(checkpoints["wan2.2_t2v"]), dtype="float32", device="cpu"
    ).pipe
    pipe.register_to_config(boundary_ratio=0.88)
    return pipe


@pytest.fixture(scope="module")
def plans(tmp_path_factory, two):
    two.scheduler.set_timesteps(STEPS)
    path = tmp_path_factory.mktemp("plans") / "plans.yaml"
    sigmas = [round(sigma, 5) for sigma in two.scheduler.sigmas.tolist()[:STEPS]]
    damping = [0.5] * PLAN.count(".")
    path.write_text(
        f"planned: {{steps: {STEPS}, sigmas: {sigmas}, "
        f"plans: {{9: {{mask: '{PLAN}', damping: {damping}}}}}}}\n"
    )
    return str(path)


@pytest.fixture
def knobs(plans):
    """Policy -> what to enable it with."""
    return lambda policy: {
        **KNOBS[policy],
        **({"calibration": plans} if policy == "planned" else {}),
    }


@pytest.fixture(autouse=True)
def without_cache(two):
    yield
    ditcache.disable_cache(two)


def run(pipe, guidance=3.0, **more):
    return pipe(
        "a cat",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        max_sequence_length=16,
        **more,
    ).frames


def by_expert(cache, branch="cond"):
    """Expert -> step -> decision on its first unit."""
    found = {"transformer": {}, "transformer_2": {}}
    for decision in cache.trace.decisions:
        if decision.branch == branch and decision.unit == 0:
            found[decision.expert][decision.step] = decision
    return found


def computed(cache, branch="cond"):
    experts = by_expert(cache, branch)
    steps = {**experts["transformer"], **experts["transformer_2"]}
    return "".join(str(int(steps[step].computed)) for step in range(STEPS))


@pytest.mark.parametrize("policy", SKIPPING)
def test_d9_the_step_counts_over_both_experts(two, policy, knobs):
    cache = ditcache.enable_cache(two, policy, head=1, **knobs(policy))
    run(two)
    for branch in ("cond", "uncond"):
        experts = by_expert(cache, branch)
        assert list(experts["transformer"]) == list(range(HIGH))
        assert list(experts["transformer_2"]) == list(range(HIGH, STEPS))
        assert experts["transformer"][0].reason == experts["transformer_2"][HIGH].reason == "first"
        for steps in experts.values():
            assert policy == "cfg_delta" or any(not d.computed for d in steps.values())


@pytest.mark.parametrize(
    "policy", ["interval", "taylorseer", "teacache", "magcache", "scm", "planned"]
)
def test_d9_a_mask_is_read_at_the_step_of_the_whole_run(two, policy, knobs):
    """What a static policy says of each expert, and the expert's first step in any case."""
    cache = ditcache.enable_cache(two, policy, head=1, tail=0, **knobs(policy))
    run(two)
    two.scheduler.set_timesteps(STEPS)
    expected = ""
    for name in ("transformer", "transformer_2"):
        schedule = schedule_reader(two)(name, STEPS)
        mask = cache.settings.policy.mask(schedule)
        mask[schedule.first] = True
        expected += "".join(str(int(mask[step])) for step in schedule.span)
    assert computed(cache) == computed(cache, "uncond") == expected


@pytest.mark.parametrize("start", [HIGH - 1, HIGH, HIGH + 1])
def test_d9_twenty_digits_with_six_steps_of_high_noise(two, start):
    """The second expert reads them from index 6 on. Whatever they say there, its first step has
    nothing to reuse and computes.
    """

    class Digits(Policy):
        def mask(self, schedule):
            return [step % 3 == start % 3 or step == 0 for step in range(STEPS)]

    cache = ditcache.enable_cache(two, Digits(), head=0, tail=0)
    run(two)
    assert [d for d in range(STEPS) if computed(cache)[d] == "1"] == sorted(
        {0, HIGH, *(step for step in range(STEPS) if step % 3 == start % 3)}
    )


@pytest.mark.parametrize("every", [2, 3, 4, 5])
@pytest.mark.parametrize("head", [1, 2, 8])
def test_d9_interval_runs_wherever_the_boundary_lies(two, every, head):
    cache = ditcache.enable_cache(two, "interval", every=every, head=head)
    run(two)
    assert len(computed(cache)) == STEPS and computed(cache)[HIGH] == "1"


def test_d9_cache_dits_own_patterns_run_wherever_the_boundary_lies(two):
    for preset in ("slow", "medium", "fast", "ultra"):
        with cached(two, "scm", preset=preset, compatible=True) as cache:
            run(two)
            assert computed(cache)[HIGH] == "1"


def test_d9_warm_up_after_the_boundary_is_a_knob(two):
    """MagCache's retention is a share of each expert's steps; head counts from the run's start."""
    ratios = [1.0] * STEPS
    for retention, expected in ((0.0, "10000010000000000000"), (0.5, "11100011111110000000")):
        knobs = {"threshold": 1.0, "max_run": 99, "retention": retention, "ratios": ratios}
        with cached(two, "magcache", head=1, tail=0, **knobs) as cache:
            run(two)
            assert computed(cache) == expected


@pytest.mark.parametrize("policy", SKIPPING)
def test_d10_the_first_expert_is_freed_at_the_boundary(two, policy, knobs):
    cache = ditcache.enable_cache(two, policy, head=1, tail=0, **knobs(policy))
    held = []

    def watch(pipe, index, timestep, tensors):
        held.append({key.expert for key in cache.store.entries})
        return tensors

    run(two, callback_on_step_end=watch)
    assert {"transformer"} in held[:HIGH] and {"transformer_2"} in held[HIGH:]
    assert all(experts <= {"transformer"} for experts in held[:HIGH])
    assert all(experts <= {"transformer_2"} for experts in held[HIGH:])
    assert cache.store.stats()["bytes"] == cache.store.stats()["entries"] == 0


@pytest.mark.parametrize("policy", SKIPPING)
def test_d23_settings_hold_for_both_experts(two, policy, knobs):
    more = {} if policy == "cfg_delta" else {"max_skips": 1}
    cache = ditcache.enable_cache(two, policy, head=3, tail=2, **more, **knobs(policy))
    run(two)
    spans = [[u.span for u in part.blocks.units] for part in cache.experts.values()]
    assert spans[0] == spans[1]
    for branch in ("cond", "uncond"):
        made = computed(cache, branch)
        assert made[:3] == "111" and made[-2:] == "11"
        assert policy == "cfg_delta" or "00" not in made


@pytest.mark.parametrize("policy", SKIPPING)
def test_d32_nothing_skipped_is_bit_exact_with_two_experts(two, policy, plans):
    plain = run(two)
    more = {"compute": STEPS, "calibration": plans} if policy == "planned" else {}
    more |= {"compute": [STEPS]} if policy == "scm" else {}
    cache = ditcache.enable_cache(two, policy, **{**FULL[policy], **more})
    assert torch.equal(run(two), plain)
    assert cache.trace.computed == len(cache.trace.decisions) == 2 * STEPS
    ditcache.disable_cache(two)
    assert torch.equal(run(two), plain)


# Settings of their own


def test_what_differs_for_the_low_noise_expert(two):
    cache = ditcache.enable_cache(two, "interval", every=2, head=1, tail=0, low={"every": 5})
    run(two)
    high, low = by_expert(cache).values()
    assert [d.computed for d in high.values()] == [step % 2 == 0 for step in range(HIGH)]
    skips = [step for step, d in low.items() if not d.computed]
    assert len(skips) > (STEPS - HIGH) / 2
    ditcache.disable_cache(two)
    same = ditcache.enable_cache(two, "interval", every=5, head=1, tail=0)
    run(two)
    assert skips == [step for step, d in by_expert(same)["transformer_2"].items() if not d.computed]


def test_another_policy_for_the_low_noise_expert(two):
    cache = ditcache.enable_cache(
        two,
        "interval",
        every=2,
        head=1,
        low={"policy": "fbcache", "threshold": 0.0, "forecaster": "taylor"},
    )
    plain_low = run(two)
    high, low = by_expert(cache).values()
    assert not all(d.computed for d in high.values())
    assert all(d.computed for d in low.values())
    assert type(cache.settings.low.policy).__name__ == "FBCache"
    assert cache.settings.low.head == 1 and cache.stats["low"]["policy"] == "FBCache"
    assert plain_low.isfinite().all()


def test_settings_that_are_all_the_same_change_nothing(two):
    ditcache.enable_cache(two, "taylorseer", every=2, head=1)
    expected = run(two)
    ditcache.disable_cache(two)
    ditcache.enable_cache(two, "taylorseer", every=2, head=1, low={})
    assert torch.equal(run(two), expected)


def test_low_needs_two_experts_and_fitting_keys(two, pipe):
    with pytest.raises(ConfigError, match=r"cache\.low: has no effect, this model has one expert"):
        ditcache.enable_cache(pipe, "interval", low={"every": 2})
    with pytest.raises(ConfigError, match="interval takes no 'threshold' here"):
        ditcache.enable_cache(two, "interval", low={"threshold": 0.1})
    with pytest.raises(ConfigError, match=r"low: has no effect without a policy for both"):
        ditcache.enable_cache(two, "interval", low={"policy": "none"})
    with pytest.raises(DitcacheError, match="granularity: must be"):
        ditcache.enable_cache(two, "fbcache", low={"granularity": 9})


def test_the_state_of_an_expert_goes_with_its_last_step(two):
    """Not only once the other one starts."""
    cache = ditcache.enable_cache(two, "taylorseer", every=2, head=1)
    held = {}

    def watch(pipe, step, timestep, more):
        held[step] = cache.store.stats()["bytes"]
        return more

    run(two, callback_on_step_end=watch)
    assert held[HIGH - 1] == 0 and held[STEPS - 1] == 0
    assert all(held[step] > 0 for step in range(STEPS - 2) if step != HIGH - 1)
