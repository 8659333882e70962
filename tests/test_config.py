"""Every YAML composes and builds, and its keys are its dataclass's fields."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from ditcache.ab.settings import AbTestSettings
from ditcache.bridge.data.base import Data
from ditcache.bridge.fusion import Fusion
from ditcache.bridge.projectors.base import Projector
from ditcache.bridge.settings import BridgeSettings
from ditcache.cache import settings as cache_settings
from ditcache.cache.calibration import calibrations, load_calibration
from ditcache.cache.cfg.delta import CfgDelta
from ditcache.cache.forecasters.base import Forecaster
from ditcache.cache.policies.base import Policy
from ditcache.cache.settings import CacheSettings
from ditcache.cache.warmstart.reuse import WarmStart
from ditcache.cli import commands, conf_dir, groups, header, options
from ditcache.commands.bridge_train import BridgeTrainSettings
from ditcache.commands.calibrate import CalibrateSettings
from ditcache.commands.generate import GenerateSettings
from ditcache.commands.rollout import RolloutSettings
from ditcache.config import build, locate
from ditcache.errors import ConfigError
from ditcache.kv.settings import KVSettings
from ditcache.metrics.measure import MetricSettings
from ditcache.models.base import Model
from ditcache.prompts import Prompts
from ditcache.store.base import Store

BASES = {
    "bridge": BridgeSettings,
    "cache": CacheSettings,
    "cache/cfg": CfgDelta,
    "cache/forecaster": Forecaster,
    "cache/warmstart": WarmStart,
    "data": Data,
    "fusion": Fusion,
    "kv": KVSettings,
    "metrics": MetricSettings,
    "model": Model,
    "projector": Projector,
    "prompts": Prompts,
    "store": Store,
}
DATA = conf_dir() / "calibration"  # no config group: models name what they need of it
LAUNCHERS = conf_dir() / "hydra" / "launcher"
EXPERIMENTS = conf_dir() / "experiment"  # choices of other groups' options
YAMLS = sorted(
    p
    for p in conf_dir().rglob("*.yaml")
    if p.parent not in (conf_dir(), DATA, LAUNCHERS, EXPERIMENTS)
)
NAMES = [p.relative_to(conf_dir()).with_suffix("").as_posix() for p in YAMLS]


ALONE = (CfgDelta, WarmStart)  # bases that are their folder's only class
CAUSAL = ("tiny_causal", "self_forcing", "longlive", "causvid", "krea_realtime", "sfwan2.2")
USED_BY = {  # groups, and options, that `generate` does not take
    "data": "bridge-train",
    "fusion": "bridge-train",
    "kv": "rollout",
    "metrics": "ab-test",
    "projector": "bridge-train",
    "prompts/changes": "ab-test",
    **{f"model/{name}": "rollout" for name in CAUSAL},
}
COMMANDS = {
    "ab-test": AbTestSettings,
    "bridge-train": BridgeTrainSettings,
    "calibrate": CalibrateSettings,
    "generate": GenerateSettings,
    "rollout": RolloutSettings,
}
LATER = {"bridge"}  # groups that are there only if they are chosen, as `+bridge=`
BESIDE = {  # what an option needs to make sense
    "cache/warmstart": ["cache=interval", "segments=2"],
    "cache/cfg": ["cache=interval"],
    "cache/forecaster": ["cache=interval"],
    "cache/forecaster/fitted": ["cache=planned"],
    "data/folder": ["data.path=clips"],
    "data/latents": ["data.path=clips.safetensors"],
    "bridge": ["bridge.path=zoo:chrono_to_wan", "model=tiny_i2v", "num_frames=29"],
    "bridge/untrained": ["model=tiny_i2v", "num_frames=29"],
    "cache/custom": ["cache.policy._target_=ditcache.cache.policies.interval.Interval"],
}


def composed(*overrides, command="generate"):
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return compose(command.replace("-", "_"), [*overrides])


def test_there_are_yamls_and_each_group_is_known():
    assert len(NAMES) > 15
    assert {name.rpartition("/")[0] for name in NAMES} == set(BASES) == {*groups()} - {"experiment"}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_composes_and_builds(name):
    group, _, option = name.rpartition("/")
    command = USED_BY.get(name, USED_BY.get(group))
    if command is not None:
        cfg = composed(f"{group}={option}", *BESIDE.get(name, []), command=command)
        assert isinstance(build(cfg, group, BASES[group]), BASES[group])
        if command == "rollout":
            assert isinstance(build(cfg, "", RolloutSettings), RolloutSettings)
        return
    chosen = [f"{'+' if group in LATER else ''}{group}={option}"]
    chosen += BESIDE.get(name, BESIDE.get(group, []))
    if "_i2v" in option or "chronoedit" in option or option == "wan2.2_ti2v_image":
        chosen.append(f"image={Path(__file__)}")
    settings = build(composed(*chosen), "", GenerateSettings)
    assert isinstance(build(composed(*chosen), group.replace("/", "."), BASES[group]), BASES[group])
    assert settings.texts


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_the_fields_of_the_class(name):
    node = OmegaConf.load(conf_dir() / f"{name}.yaml")
    group = name.rpartition("/")[0]
    cls = locate(node._target_, name) if "_target_" in node else BASES[group]
    keys = {str(key) for key in node} - {"_target_", "defaults"}
    if name == "cache/none":
        assert keys == {"policy"}
        return
    if "defaults" in node:
        keys |= {
            str(key).rpartition("@")[2]
            for default in node.defaults
            if not isinstance(default, str)
            for key in default
        }
    assert keys == {field.name for field in fields(cls) if field.init}
    if group == "cache" and not OmegaConf.is_missing(node.policy, "_target_"):
        policy = locate(node.policy._target_, name)
        keys = {str(key) for key in node.policy} - {"_target_"}
        assert keys == {field.name for field in fields(policy) if field.init}


@pytest.mark.parametrize("name", NAMES)
def test_the_head_comment_holds_a_command_that_uses_it(name):
    text = " ".join(header(conf_dir() / f"{name}.yaml"))
    group, _, option = name.rpartition("/")
    command = USED_BY.get(name, USED_BY.get(group, "generate"))
    assert f"ditcache {command}" in text and f"{group}={option}" in text


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_builds_with_the_command_in_its_head_comment(path):
    text = " ".join(header(path))
    (command,) = (name for name in COMMANDS if f"ditcache {name} experiment={path.stem}" in text)
    settings = build(composed(f"experiment={path.stem}", command=command), "", COMMANDS[command])
    assert path.stem == "draft_then_refine" or settings.projector.gate_granularity


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_primary_yaml_and_its_keys_are_fields(command):
    assert set(commands()) == set(COMMANDS)
    keys = {str(key) for key in composed(command=command)} - {"hydra"}
    known = {field.name for field in fields(COMMANDS[command]) if field.init}
    assert keys == known - {"b"} - LATER  # the arm that is there only if it is chosen


@pytest.mark.parametrize("policy", sorted({*options("cache")} - {"none", "custom"}))
def test_the_python_api_reads_what_hydra_composes(policy):
    by_name = cache_settings.read_settings(policy, None, {})
    assert by_name == build(composed(f"cache={policy}"), "cache", CacheSettings)


def test_every_policy_and_forecaster_file_has_a_yaml():
    root = Path(cache_settings.__file__).parent
    for folder, group, base in (
        ("policies", "cache", Policy),
        ("forecasters", "cache/forecaster", Forecaster),
        ("cfg", "cache/cfg", CfgDelta),
        ("warmstart", "cache/warmstart", WarmStart),
    ):
        files = {path.stem for path in (root / folder).glob("*.py")} - {"base", "__init__"}
        assert files and files <= set(options(group))
        for name in files:
            module = __import__(f"ditcache.cache.{folder}.{name}", fromlist=["x"])
            assert any(
                isinstance(v, type) and issubclass(v, base) and (v is not base or base in ALONE)
                for v in vars(module).values()
            )


def test_fitted_without_a_plan_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"cache\.forecaster: fitted .* use cache=planned"):
        build(composed("cache=interval", "cache/forecaster=fitted"), "cache", CacheSettings)


@pytest.mark.parametrize("policy", ["interval", "easycache", "dbcache"])
def test_cfg_delta_stands_beside_any_policy(policy):
    chosen = [f"cache={policy}", "cache/cfg=delta", "cache.cfg.every=3"]
    settings = build(composed(*chosen), "cache", CacheSettings)
    assert settings.cfg == CfgDelta(every=3)
    assert cache_settings.read_settings(policy, None, {}, CfgDelta(every=3)) == settings
    assert cache_settings.read_settings(policy, None, {}, "delta").cfg == CfgDelta()
    assert cache_settings.read_settings(policy, None, {}).cfg is None


def test_cfg_keys_need_a_cfg_option():
    with pytest.raises(ConfigCompositionException, match=r"cache\.cfg\.every"):
        composed("cache=interval", "cache.cfg.every=3")


def test_cfg_delta_without_guidance_is_refused():
    with pytest.raises(ConfigError, match=r"cache\.cfg: has no effect without guidance"):
        build(composed("cache=cfg_delta", "guidance=1"), "", GenerateSettings)


def numbers(content):
    """Every number below a node, and every text that should be one."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for part in content for number in numbers(part)]
    return [content]


@pytest.mark.parametrize("name", calibrations())
def test_a_calibration_loads_and_its_numbers_are_finite(name):
    known = load_calibration(name)
    assert known.source and known.model
    assert known.teacache or known.magcache or known.planned
    for signal, polynomial in known.teacache.items():
        assert signal in ("e", "e0") and len(polynomial["coefficients"]) >= 2
        assert all(math.isfinite(number) for number in numbers(polynomial))
    for branch in known.magcache.keys() - {"steps"}:
        ratios = known.magcache[branch]
        assert branch in ("cond", "uncond") and len(ratios) == known.magcache["steps"]
        assert ratios[0] == 1.0 and all(0 < ratio < 2 for ratio in ratios)


@pytest.mark.parametrize("name", [n for n in calibrations() if load_calibration(n).planned])
def test_the_plans_of_a_calibration_fit_their_number_of_steps(name):
    known = load_calibration(name).planned
    steps, sigmas = known["steps"], known["sigmas"]
    assert len(sigmas) == steps and sigmas == sorted(sigmas, reverse=True)
    assert all(0 < sigma <= 1 for sigma in sigmas)
    for count, plan in known["plans"].items():
        mask = plan["mask"]
        assert len(mask) == steps and set(mask) <= {"#", "."}
        assert mask.count("#") == count and mask[0] == mask[-1] == "#"
        assert len(plan.get("weights") or plan["damping"]) == mask.count(".")
        for weights in plan.get("weights", []):
            assert sum(weights) == pytest.approx(1.0, abs=1e-3) and len(weights) <= 3
        assert all(math.isfinite(number) for number in plan.get("damping", []))


@pytest.mark.parametrize("name", options("model"))
def test_the_calibration_a_model_names_is_there(name):
    calibration = OmegaConf.load(conf_dir() / "model" / f"{name}.yaml").calibration
    assert calibration is None or calibration in calibrations()
    assert len(calibrations()) > 10


@dataclass
class Inner:
    size: int

    def __post_init__(self):
        if self.size < 0:
            raise ValueError(f"size: must be >= 0, got {self.size}")


@dataclass
class Outer:
    inner: Inner
    names: list[str]
    ratio: float = 0.5
    label: str | None = None


def test_build_converts_nests_and_defaults():
    cfg = OmegaConf.create({"a": {"inner": {"size": "3"}, "names": ["x", "y"], "ratio": 1}})
    assert build(cfg, "a", Outer) == Outer(Inner(3), ["x", "y"], 1.0)


def test_text_that_looks_like_an_interpolation_stays_text():
    cfg = OmegaConf.create({"inner": {"size": 1}, "names": [r"a \${b}"], "label": r"\${x} \\\${y}"})
    assert build(cfg, "", Outer).names == ["a ${b}"]
    assert build(cfg, "", Outer).label == r"${x} \${y}"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"inner": {"size": -1}, "names": []}, "a.inner.size: must be >= 0, got -1"),
        ({"inner": {"size": "x"}, "names": []}, "a.inner.size: Value 'x'"),
        (
            {"inner": {"size": 1, "seize": 2}, "names": []},
            r"a.inner.seize: no such key. Did you mean 'size'\?",
        ),
        ({"inner": {"size": 1}}, "a.names: needs a value"),
        ({"inner": {"size": 1}, "names": "x"}, "a.names: "),
        ({"inner": 3, "names": []}, "a.inner: needs a group of keys"),
        (
            {"inner": {"size": 1}, "names": [], "ratio": "${b}"},
            "a.ratio: Interpolation key 'b' not found",
        ),
        ({"inner": {"size": 1, "_target_": "test_config.Outer"}, "names": []}, "is not a Inner"),
        ({"inner": {"size": 1, "_target_": "nothing"}, "names": []}, "needs package.module.Class"),
    ],
)
def test_build_says_where_and_what(node, message):
    with pytest.raises(ConfigError, match=message):
        build(OmegaConf.create({"a": node}), "a", Outer)


def test_a_policy_in_the_working_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_policy.py").write_text(
        "from dataclasses import dataclass\n"
        "from ditcache.cache.policies.base import Policy\n\n"
        "@dataclass\nclass Mine(Policy):\n    limit: float = 0.5\n"
    )
    cfg = OmegaConf.create({"policy": {"_target_": "own_policy.Mine", "limit": 2}})
    assert build(cfg, "policy", Policy).limit == 2.0
