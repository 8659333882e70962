"""The script that puts a bridge into the package: half of the bytes, the same bridge."""

import sys
from types import SimpleNamespace

import embed_bridge
import pytest
import torch
from safetensors.torch import load_file

from ditcache.bridge import controls_file, saved
from ditcache.bridge.controls import OutputAverage
from ditcache.bridge.controls_file import controls_path, load_controls, save_controls
from ditcache.bridge.students import LowRankUpdate, Router


@pytest.fixture
def script(tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    zoo.mkdir()
    for module in (embed_bridge, controls_file, saved):
        monkeypatch.setattr(module, "ZOO", zoo)
    return embed_bridge


def test_a_run_goes_into_the_package(script, tmp_path, monkeypatch):
    shipped = saved.Path(saved.__file__).parent.parent / "zoo/bridges/chrono_to_wan.safetensors"
    run, zoo = tmp_path / "run", tmp_path / "zoo"
    run.mkdir()
    bridge = run / "bridge.safetensors"
    bridge.write_bytes(shipped.read_bytes())
    linear = torch.nn.Linear(8, 8)
    block = SimpleNamespace(attn1=SimpleNamespace(to_k=linear, to_v=linear))
    target = SimpleNamespace(blocks=[block])
    students = {
        "output averaging": OutputAverage(0.25), "router": Router(16),
        "lora": LowRankUpdate(target, 2),
    }  # fmt: skip
    save_controls(controls_path(bridge, "wan"), bridge, students)
    monkeypatch.setattr(sys, "argv", ["embed_bridge.py", str(run), "--name", "mine"])
    script.main()
    made = zoo / "mine.safetensors"
    assert saved.read_header(made) == saved.read_header(shipped)
    before, after = load_file(shipped), load_file(made)
    assert all(after[name].dtype == torch.float16 for name in before)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name].float(), tensor.float(), rtol=1e-3, atol=1e-6)
    found, _ = load_controls(controls_path(made, "wan"), made, target, target)
    assert set(found) == {"output averaging", "output router"}
