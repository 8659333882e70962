"""`ditcache rollout plan=true`: the reference's tables of bytes and operations, and a run's own
bytes.
"""

import pytest
import torch

from ditcache import cli
from ditcache.kv.settings import KVSettings
from ditcache.kv.size import kv_bytes
from ditcache.models.base import Architecture
from ditcache.pipeline.chunks import warped
from ditcache.pipeline.rollout import Recipe, rollout
from ditcache.pipeline.text import TextStates
from ditcache.report.rollout_plan import chunk_flops, count, forward_flops, prefix_flops

SHAPES = {
    "1.3B": Architecture(layers=30, heads=12, head_dim=128, ffn=8960),
    "14B": Architecture(layers=40, heads=40, head_dim=128, ffn=13824),
    "5B": Architecture(layers=30, heads=24, head_dim=128, ffn=14336),
}
GIB = {  # size, tokens of a frame, frames -> GiB in bf16
    ("1.3B", 1560): {
        6: 1.61,
        9: 2.41,
        12: 3.21,
        15: 4.02,
        21: 5.62,
        60: 16.1,
        120: 32.1,
        240: 64.3,
    },
    ("14B", 1560): {6: 7.14, 9: 10.71, 12: 14.28, 15: 17.85, 21: 24.99, 60: 71.4, 240: 285.6},
    ("5B", 390): {6: 0.80, 9: 1.21, 21: 2.81, 240: 32.1},
    ("5B", 880): {6: 1.81, 12: 3.63, 21: 6.34, 120: 36.3},
    ("1.3B", 3600): {6: 3.71, 21: 12.98, 60: 37.1},
    ("14B", 3600): {6: 16.5, 21: 57.7, 240: 659},
}


@pytest.mark.parametrize(("size", "unit"), GIB)
def test_bytes(size, unit):
    shape = SHAPES[size]
    for frames, expected in GIB[size, unit].items():
        found = kv_bytes(shape.layers, shape.heads, 128, unit * frames, 2, "none") / 2**30
        assert found == pytest.approx(expected, rel=0.006), frames
    quantised = [
        kv_bytes(shape.layers, shape.heads, 128, unit * 21, 2, c) / 2**30 for c in ("int8", "int4")
    ]
    if unit == 1560:
        assert quantised == pytest.approx({"1.3B": [2.9, 1.6], "14B": [12.7, 7.0]}[size], rel=0.03)


def test_operations_of_a_forward():
    """3-frame chunk of 1,560 tokens: linear, cross- and self-attention, in TFLOP."""
    for size, linear, cross, selves in (
        ("1.3B", 11.8, 0.44, {3: 4.0, 12: 16.1, 21: 28.3, 42: 56.5, 120: 161.5, 240: 323}),
        ("14B", 114, 2.0, {3: 17.9, 12: 71.8, 21: 125.6, 42: 251, 120: 718, 240: 1435}),
    ):
        for frames, attention in selves.items():
            found = forward_flops(SHAPES[size], 4680, 1560 * frames) / 1e12
            assert found == pytest.approx(linear + cross + attention, rel=0.01)


@pytest.mark.parametrize(
    ("size", "chunks", "recompute", "full", "w21", "w12"),
    [
        ("1.3B", 7, 2.72, 1.00, 1.00, 0.87),
        ("1.3B", 20, 35.1, 5.47, 3.63, 2.72),
        ("1.3B", 40, 225, 19.0, 7.69, 5.57),
        ("1.3B", 80, 1588, 70.3, 15.8, 11.3),
        ("14B", 7, 18.8, 6.57, 6.57, 6.03),
        ("14B", 20, 206, 30.4, 22.3, 18.2),
        ("14B", 80, 7832, 337, 94.8, 74.6),
    ],
)
def test_operations_of_a_video(size, chunks, recompute, full, w21, w12):
    shape, lengths = SHAPES[size], [3] * chunks
    assert sum(prefix_flops(shape, lengths, 1560, 4)) / 1e15 == pytest.approx(recompute, rel=0.01)
    for window, expected in ((None, full), (21, w21), (12, w12)):
        found = sum(chunk_flops(shape, lengths, 1560, window, 5)) / 1e15
        assert found == pytest.approx(expected, rel=0.01)


def planned(monkeypatch, tmp_path, *arguments):
    found = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ditcache.report.rollout_plan.show", found.append)
    assert cli.run(["rollout", "plan=true", *arguments]) == 0
    assert not list(tmp_path.iterdir()), "nothing is written"
    return count(found[0])


@pytest.mark.parametrize(
    ("model", "gib"),
    [("self_forcing", 5.62), ("longlive", 3.21), ("krea_realtime", 7.14), ("sfwan2.2", 2 * 24.99)],
)
def test_of_the_published_models(monkeypatch, tmp_path, model, gib):
    found = planned(monkeypatch, tmp_path, f"model={model}", "chunks=20")
    assert found["kv_bytes"] / 2**30 == pytest.approx(gib, rel=0.005)
    assert found["tokens_per_frame"] == 1560 and found["ceiling"] >= 2


@pytest.mark.parametrize(
    "kv",
    [
        ["kv=rolling"],
        ["kv=int8"],
        ["kv=int4"],
        ["kv=rolling", "kv.window=null"],
        ["kv=rolling", "guidance=3", "kv.sink=3"],
    ],
)
def test_the_bytes_are_those_of_a_run(monkeypatch, tmp_path, bundle, kv):
    found = planned(monkeypatch, tmp_path, "model.path=zoo:wan-tiny", "chunks=4", *kv)
    codec = kv[0][3:] if kv[0] != "kv=rolling" else "none"
    window = None if "kv.window=null" in kv else 9
    settings = KVSettings(window, 3 if "kv.sink=3" in kv else 0, codec=codec)
    states = torch.zeros(1, 8, 64)
    guidance = 3.0 if "guidance=3" in kv else 1.0
    recipe = Recipe((3,) * 4, warped([1000], 5.0), kv=settings, guidance=guidance)
    chunks = list(rollout(bundle, recipe, {0: TextStates(states, states)}, height=64, width=64))
    assert chunks[-1].kv_bytes == found["kv_bytes"]


def test_offloading_moves_the_window_to_the_store(monkeypatch, tmp_path):
    found = planned(
        monkeypatch, tmp_path, "model=longlive", "store=tiered", "kv.offload=true", "chunks=20"
    )
    assert found["offloaded_bytes"] / 2**30 == pytest.approx(3.21, rel=0.005)
    assert found["kv_bytes"] < 0.4 * found["offloaded_bytes"]


def test_it_prints_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.run(
            [
                "rollout",
                "plan=true",
                "model=self_forcing",
                "model.device=cpu",
                "cache=interval",
                "cache.head=1",
                "cache.policy.every=2",
                "chunks=20",
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    for words in (
        "237 frames of 832x480",
        "5.62 GiB on the device",
        "at least",
        "TFLOP/s",
        "2.5x at most",
    ):
        assert words in text, words
    assert not list(tmp_path.iterdir())
