"""Zoo members as differences from the base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import ditcache
from ditcache.models import delta, zoo
from ditcache.models.base import ZOO


@pytest.fixture
def base():
    return load_file(ZOO / "wan-tiny/transformer" / zoo.WEIGHTS)


def test_a_difference_comes_back_within_half_a_step(base):
    torch.manual_seed(0)
    weights = {k: v.float() + 0.01 * torch.randn(v.shape) for k, v in base.items()}
    again = delta.decode(delta.encode(weights, base), base)
    for name, value in weights.items():
        rows = (value - base[name].float()).flatten(1) if value.dim() > 1 else value[None]
        step = (rows.abs().amax(-1) if value.dim() > 1 else
                (value - base[name].float()).abs().amax()[None]) / 127  # fmt: skip
        error = (again[name] - value).abs().reshape(len(step), -1).amax(-1)
        assert (error <= 0.502 * step + 1e-9).all(), name


def test_no_difference_is_exact(base):
    again = delta.decode(delta.encode(base, base), base)
    assert all(torch.equal(again[name], value.float()) for name, value in base.items())


def test_new_channels_and_new_tensors(base):
    wide = torch.zeros(base["patch_embedding.weight"].shape[0], 36, 1, 2, 2)
    wide[:, :16] = base["patch_embedding.weight"]
    wide[:, 16:] = 0.25
    weights = {"patch_embedding.weight": wide, "new.weight": torch.ones(3, 4)}
    again = delta.decode(delta.encode(weights, base), base)
    assert (again["patch_embedding.weight"] - wide).abs().max() < 0.25 / 127
    assert torch.equal(again["new.weight"], weights["new.weight"])


def test_a_member_is_put_together(tmp_path, monkeypatch, bundle, base):
    """A folder with a difference and shared parts loads as the pipeline it stands for."""
    root = tmp_path / "zoo"
    shutil.copytree(ZOO / "wan-tiny", root / "wan-tiny")
    member = root / "member"
    (member / "transformer").mkdir(parents=True)
    shutil.copytree(ZOO / "wan-tiny/scheduler", member / "scheduler")
    shutil.copy(ZOO / "wan-tiny/model_index.json", member)
    shutil.copy(ZOO / "wan-tiny/transformer/config.json", member / "transformer")
    weights = {k: v.float() * 1.01 for k, v in base.items()}
    save_file(delta.encode(weights, base), member / "transformer" / zoo.DELTA)
    origins = dict.fromkeys(("vae", "text_encoder", "tokenizer"), "wan-tiny")
    (member / zoo.SHARED).write_text(json.dumps(origins))
    for module in ("ditcache.models.base", "ditcache.models.zoo"):
        monkeypatch.setattr(f"{module}.ZOO", root)
    loaded = ditcache.load("tiny", path="zoo:member").pipe
    assert loaded.transformer.dtype == torch.float32 and not loaded.transformer.training
    for name, value in loaded.transformer.state_dict().items():
        assert torch.allclose(value, weights[name], rtol=0.02, atol=1e-4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            loaded.vae.state_dict().values(), bundle.pipe.vae.state_dict().values(), strict=True
        )
    )
    assert type(loaded.tokenizer) is type(bundle.pipe.tokenizer)
