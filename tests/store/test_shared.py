"""Processes that share what warm starts compute, through one directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ditcache
from ditcache.cache.warmstart.reuse import WarmStart
from ditcache.store.shared import FOLDER, SharedFolder
from ditcache.store.tiered import TieredStore

ROOT = Path(__file__).parents[2]
pytest.importorskip("fsspec")


@pytest.fixture
def folder(tmp_path):
    folder = SharedFolder(f"file://{tmp_path}")
    yield folder
    folder.close()
    assert not list((tmp_path / FOLDER).glob(".*"))


def test_what_is_put_is_found_strides_and_all(folder, tmp_path):
    tensor = torch.randn(2, 3, 4).transpose(0, 2)
    for name, value in (("a", tensor), ("b", tensor.bfloat16()), ("a", tensor + 1)):
        folder.put(name, value)
    folder.close()
    other = SharedFolder(f"file://{tmp_path}")
    found = other.get("a", torch.device("cpu"))
    assert torch.equal(found, tensor) and found.stride() == tensor.stride()  # the first one stays
    assert torch.equal(other.get("b", torch.device("cpu")), tensor.bfloat16())
    assert other.get("c", torch.device("cpu")) is None
    assert folder.counts == {"hits": 0, "misses": 0, "written": 2, "faults": 0}
    assert other.counts == {"hits": 2, "misses": 1, "written": 0, "faults": 0}
    other.close()


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_file_is_computed_again(folder, damage):
    folder.put("a", torch.randn(100))
    folder.land()
    path = Path(folder.path("a"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes({"flipped": content, "truncated": content[:50], "emptied": b""}[damage])
    with pytest.warns(RuntimeWarning, match="store: the shared folder failed"):
        assert folder.get("a", torch.device("cpu")) is None
    assert folder.counts["faults"] == 1


def test_it_needs_a_place_and_is_off_by_default():
    with pytest.raises(ValueError, match="share: has no effect without a place"):
        TieredStore(share=True)
    assert not TieredStore(remote="file:///tmp").shares


def run(pipe, url, share=True, seed=0):
    """Two segments by hand -> reasons of every call, outputs, the shared folder's counters."""
    from by_hand import by_hand, moving_latents

    def latents(step):
        return moving_latents(step, seed=seed)

    settings = {"remote": url, "share": True} if share else {}
    with TieredStore(gpu=None, cpu=0, disk=0, **settings) as store:
        cache = ditcache.enable_cache(
            pipe, "interval", every=2, head=2, granularity=4, store=store,
            warmstart=WarmStart(steps=2, window=1),
        )  # fmt: skip
        with cache.one_video():
            outputs = [by_hand(pipe, steps=4, latents=latents) for _ in range(2)]
        reasons = [d.reason for d in cache.trace.decisions]
        ditcache.disable_cache(pipe)
        counts = store.stats().get("shared", {})
    return reasons, outputs, counts


def equal(first, second):
    return all(
        torch.equal(a, b)
        for one, two in zip(first, second, strict=True)
        for branch in one
        for a, b in zip(one[branch], two[branch], strict=True)
    )


def test_two_processes_and_one_directory(pipe, tmp_path, monkeypatch):
    """The second computes nothing that the first did, and its video is bit for bit the same."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "cache"))
    url, result = f"file://{tmp_path}/shared", tmp_path / "result.pt"
    child = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests' / 'store')!r}, {str(ROOT / 'tests' / 'cache')!r}]\n"
        "import torch; torch.set_num_threads(1)\n"
        "import ditcache, test_shared\n"
        f"torch.save(test_shared.run(ditcache.load('tiny').pipe, {url!r}), {str(result)!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", child], check=True, env=environment)
    first, theirs, written = torch.load(result, weights_only=True)

    plain, outputs, _ = run(pipe, url, share=False)
    assert equal(outputs, theirs)
    assert first == plain and "shared" not in first  # nobody was there before
    entries = 2 * 2 * 2  # steps, branches, units
    assert written["misses"] == entries

    second, ours, counts = run(pipe, url)
    assert equal(outputs, ours)
    assert second.count("shared") == entries == counts["hits"]
    assert [r for r in second if r != "shared"] == [r for r in plain if r not in ("first", "head")]
    assert counts["written"] == counts["faults"] == 0

    third, others, counts = run(pipe, url, seed=1)  # another video
    assert "shared" not in third and counts["hits"] == 0
    assert not equal(outputs, others)
    assert len(list((tmp_path / "shared").iterdir())) == 1  # each store's own folder is gone


def test_other_weights_have_other_names(pipe, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "cache"))
    url = f"file://{tmp_path}"
    run(pipe, url)
    weight = pipe.transformer.blocks[0].ffn.net[2].weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1e-3
    try:
        reasons, _, counts = run(pipe, url)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert counts["hits"] == 0 and "shared" not in reasons
