"""`plan=true`: figures before anything is loaded, against published ones and the real shapes."""

import pytest
from omegaconf import OmegaConf

from ditcache import cli
from ditcache.commands.generate import GenerateSettings
from ditcache.config import build, load_yaml
from ditcache.models.base import Model
from ditcache.report.plan import count


def settings(monkeypatch, tmp_path, *arguments):
    """What the command would plan with."""
    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ditcache.report.plan.show", found.append)
    assert cli.run(["generate", "plan=true", *arguments]) == 0
    assert isinstance(found[0], GenerateSettings)
    assert not list(tmp_path.iterdir()), "nothing is written"
    return found[0]


# Reference (computed there by hand): tokens, TFLOPs of a forward, MB of one hidden tensor.
KNOWN = [
    ("wan", [], 32760, 283, 100.6),
    ("wan", ["height=720", "width=1280"], 75600, 1250, 232.2),
    ("wan2.1_14b", ["height=480", "width=832"], 32760, 1678, 335.5),
    ("wan2.2_t2v", [], 75600, 6523, 774.1),
    ("wan2.2_ti2v", [], 27280, 517, 167.6),
]


@pytest.mark.parametrize(("model", "more", "tokens", "teraflops", "hidden"), KNOWN)
def test_against_the_reference(monkeypatch, tmp_path, model, more, tokens, teraflops, hidden):
    chosen = settings(
        monkeypatch, tmp_path, f"model={model}", "cache=interval", "cache.policy.every=2", *more
    )
    found = count(chosen)
    assert found["tokens"] == tokens
    assert found["forward_flops"] / 1e12 == pytest.approx(teraflops, rel=0.01)
    assert found["state_bytes"] / 2e6 == pytest.approx(hidden, rel=0.01)  # of two branches
    assert found["forwards"] == 2 * chosen.steps


def test_the_embedded_model_is_as_described(bundle, monkeypatch, tmp_path):
    shape = build(OmegaConf.create({"model": load_yaml("model", "tiny")}), "model", Model)
    shape = shape.architecture
    transformer = bundle.pipe.transformer
    exact = sum(p.numel() for p in transformer.parameters() if p.dim() > 1)
    assert shape.parameters == pytest.approx(exact, rel=0.03)
    assert shape.layers == len(transformer.blocks)
    for part, value in (("text_encoder", shape.text_encoder), ("vae", shape.vae)):
        exact = sum(p.numel() for p in getattr(bundle.pipe, part).parameters())
        assert value == pytest.approx(exact, rel=0.03)
    assert shape.tokens(64, 64, 17) == 80


@pytest.mark.parametrize("granularity", ["stack", "per_block", "3", "output"])
@pytest.mark.parametrize("cache", ["taylorseer", "fbcache", "planned", "dicache"])
def test_state_is_what_a_run_keeps(monkeypatch, tmp_path, bundle, cache, granularity):
    """The plan's bytes are the store's peak."""
    import ditcache

    chosen = settings(monkeypatch, tmp_path, f"cache={cache}", f"cache.granularity={granularity}")
    size = int(granularity) if granularity.isdigit() else granularity
    step_cache = ditcache.enable_cache(bundle, cache, granularity=size)
    bundle.pipe(
        "a red star",
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=24,
        guidance_scale=4.0,
        output_type="latent",
    )
    ditcache.disable_cache(bundle)
    assert count(chosen)["state_bytes"] == step_cache.store.stats()["bytes_peak"]


def test_what_a_static_policy_computes(monkeypatch, tmp_path):
    found = count(settings(monkeypatch, tmp_path, "cache=planned", "cache.policy.compute=8"))
    assert found["computed_steps"] == 8
    found = count(settings(monkeypatch, tmp_path, "cache=fbcache"))
    assert found["computed_steps"] is None
    for more in ("cache=cfg_delta", "cache.max_skips=1", "cache.budget=3"):
        found = count(settings(monkeypatch, tmp_path, "cache=interval", more))
        assert found["computed_steps"] is None, more
    found = count(settings(monkeypatch, tmp_path))
    assert found["computed_steps"] == 24 and found["state_bytes"] == 0


def test_it_prints_a_table_and_renders_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["generate", "model=wan2.2_t2v", "plan=true", "model.offload=model"]) == 0
    text = capsys.readouterr().out
    for words in ("81 frames of 1280x720: 75600 tokens", "TFLOPs", "GiB", "offload model"):
        assert words in text
    assert not list(tmp_path.iterdir())
    assert cli.run(["generate", "plan=true", "cache=fbcache", "compare=true"]) == 2
    assert "plan: renders nothing to compare" in capsys.readouterr().err


def test_offload_needs_less_at_once(monkeypatch, tmp_path):
    resident = [
        count(settings(monkeypatch, tmp_path, "model=wan2.2_t2v", f"model.offload={kind}"))
        for kind in ("none", "model", "group")
    ]
    sizes = [found["resident_bytes"] for found in resident]
    assert sizes[0] > sizes[1] > sizes[2] > 0
    assert sizes[1] == pytest.approx(28e9, rel=0.05)
