"""The rollout benchmark measures what it says: both arms make the same video."""

import json

import bench_rollout
import torch


def test_speed_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "speed",
        "--path",
        "zoo:wan-tiny",
        "--chunks",
        "2",
        "--size",
        "32",
        "--rounds",
        "1",
    ]
    monkeypatch.setattr("sys.argv", ["bench_rollout.py", *arguments])
    bench_rollout.main()
    found = json.loads((tmp_path / "outputs/bench_rollout/speed.json").read_text())
    assert found["difference"] < 1e-4 and found["wall"]["ratio"] > 0 and found["cpu"]["ratio"] > 0
    assert "| chunk (wall) | cached | past recomputed |" in capsys.readouterr().out


def test_the_other_layout_holds_the_same():
    cat, ring = bench_rollout.Concatenating(1, 6), bench_rollout.RollingKVCache(1, 6)
    for index in range(8):
        cat.overwrite = bool(index % 2)
        ring.enable_overwrite_mode() if cat.overwrite else ring.enable_append_mode()
        new = [torch.randn(1, 2, 1, 4) for _ in range(2)]
        kept = cat.update(0, *new)
        ring.update(0, *new)
        assert torch.equal(kept[0], ring.block_caches[0].cached_key)
        assert torch.equal(kept[1], ring.block_caches[0].cached_value)
