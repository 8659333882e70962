"""Every YAML composes and builds, and its keys are its dataclass's fields."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ditcache.cache import settings as cache_settings
from ditcache.cache.forecasters.base import Forecaster
from ditcache.cache.policies.base import Policy
from ditcache.cache.settings import CacheSettings
from ditcache.cli import commands, conf_dir, groups, header, options
from ditcache.commands.generate import GenerateSettings
from ditcache.config import build, locate
from ditcache.errors import ConfigError
from ditcache.models.base import Model
from ditcache.prompts import Prompts
from ditcache.store.base import Store

BASES = {
    "cache": CacheSettings,
    "cache/forecaster": Forecaster,
    "model": Model,
    "prompts": Prompts,
    "store": Store,
}
YAMLS = sorted(p for p in conf_dir().rglob("*.yaml") if p.parent != conf_dir())
NAMES = [p.relative_to(conf_dir()).with_suffix("").as_posix() for p in YAMLS]


def composed(*overrides):
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return compose("generate", [*overrides])


def test_there_are_yamls_and_each_group_is_known():
    assert len(NAMES) > 15
    assert {name.rpartition("/")[0] for name in NAMES} == set(BASES) == set(groups())


@pytest.mark.parametrize("name", NAMES)
def test_every_option_composes_and_builds(name):
    group, _, option = name.rpartition("/")
    chosen = (
        ["cache=interval", f"{group}={option}"]
        if group == "cache/forecaster"
        else [f"{group}={option}"]
    )
    if "i2v" in option or option == "chronoedit":
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
            str(key) for default in node.defaults if not isinstance(default, str) for key in default
        }
    assert keys == {field.name for field in fields(cls) if field.init}
    if group == "cache":
        policy = locate(node.policy._target_, name)
        assert {str(key) for key in node.policy} - {"_target_"} == {f.name for f in fields(policy)}


@pytest.mark.parametrize("name", NAMES)
def test_the_head_comment_holds_a_command_that_uses_it(name):
    text = " ".join(header(conf_dir() / f"{name}.yaml"))
    group, _, option = name.rpartition("/")
    assert "ditcache generate" in text and f"{group}={option}" in text


def test_every_command_has_a_primary_yaml_and_its_keys_are_fields():
    assert list(commands()) == ["generate"]
    keys = {str(key) for key in composed()} - {"hydra"}
    assert keys == {field.name for field in fields(GenerateSettings) if field.init}


@pytest.mark.parametrize("policy", [p for p in options("cache") if p != "none"])
def test_the_python_api_reads_what_hydra_composes(policy):
    by_name = cache_settings.read_settings(policy, None, {})
    assert by_name == build(composed(f"cache={policy}"), "cache", CacheSettings)


def test_every_policy_and_forecaster_file_has_a_yaml():
    root = Path(cache_settings.__file__).parent
    for folder, group, base in (
        ("policies", "cache", Policy),
        ("forecasters", "cache/forecaster", Forecaster),
    ):
        files = {path.stem for path in (root / folder).glob("*.py")} - {"base", "__init__"}
        assert files and files <= set(options(group))
        for name in files:
            module = __import__(f"ditcache.cache.{folder}.{name}", fromlist=["x"])
            assert any(
                isinstance(v, type) and issubclass(v, base) and v is not base
                for v in vars(module).values()
            )


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
