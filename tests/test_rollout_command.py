"""`ditcache rollout` as people type it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ditcache import cli
from ditcache.pipeline import rollout as loop

SMALL = ["model.path=zoo:wan-tiny", "chunks=3", "timesteps=[1000,500]"]
PROMPT = "a red star moves left on a blue background"


def command(tmp_path, *arguments):
    return cli.run(["rollout", *SMALL, *arguments, f"hydra.run.dir={tmp_path}/run"])


def rows(folder):
    return [json.loads(line) for line in (folder / "chunks.jsonl").read_text().splitlines()]


def test_files_of_a_run(tmp_path, read_mp4, capsys):
    arguments = [
        PROMPT,
        "a second one, it's (new)",
        "switch.2=a green star, it's 50% ${new}",
        "kv.window=6",
        "recache=true",
        "save_latents=true",
        "upscale=2",
    ]
    assert command(tmp_path, *arguments) == 0
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir() if p.is_file()} == {
        "chunks.jsonl", "config.yaml", "contact_sheet.png", "metrics.json", "video-000.mp4", "video-001.mp4",
    }  # fmt: skip
    assert read_mp4(folder / "video-000.mp4", 128, 128).shape == (33, 128, 128, 3)
    found = rows(folder)
    assert [(r["video"], r["chunk"], r["frames"], r["evicted"], r["recached"]) for r in found] == [
        (v, c, n, e, r)
        for v in (0, 1)
        for c, n, e, r in ((0, 9, 0, 0), (1, 12, 0, 0), (2, 12, 3, 6))
    ]
    assert [r["prompt"] for r in found[:3]] == [PROMPT, PROMPT, "a green star, it's 50% ${new}"]
    assert found[3]["prompt"] == "a second one, it's (new)"
    assert len({r["kv_bytes"] for r in found}) == 1 and all(
        set(r["seconds"]) == {"denoise", "context", "decode"} for r in found
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["model"], metrics["kv"], metrics["frames"], metrics["lengths"]) == (
        "tiny_causal",
        "rolling",
        33,
        [3, 3, 3],
    )
    latents = load_file(folder / "latents-001" / "chunk-0002.safetensors")["latents"]
    assert latents.shape == (1, 16, 3, 8, 8) and latents.isfinite().all()
    out = capsys.readouterr().out
    assert "2 video(s) of 33 frames" in out and "6 latent frames" in out and str(folder) in out


def test_the_same_again_and_offloaded(tmp_path):
    """Seed and settings say what comes; a store without codecs changes nothing, and is seen."""
    tiers = [
        "store=tiered",
        "store.gpu=0",
        "store.cpu=400KiB",
        "store.disk=1MiB",
        "kv.offload=true",
        "kv.window=6",
    ]
    for name, more in (("one", ["kv.window=6"]), ("two", ["kv.window=6"]), ("three", tiers)):
        assert command(tmp_path / name, PROMPT, "save_latents=true", *more) == 0
    last = [
        load_file(tmp_path / n / "run/latents-000/chunk-0002.safetensors")["latents"]
        for n in ("one", "two", "three")
    ]
    assert torch.equal(last[0], last[1]) and torch.equal(last[0], last[2])
    kept = rows(tmp_path / "three" / "run")
    assert sum(kept[-1]["tiers"].values()) > 0 and kept[-1]["tiers"]["disk"] > 0
    assert kept[-1]["kv_bytes"] < rows(tmp_path / "one" / "run")[-1]["kv_bytes"]
    assert not list((tmp_path / "three").rglob("*.part")) and not [
        p
        for p in (tmp_path / "three/run").iterdir()
        if p.is_dir() and p.name not in (".hydra", "latents-000")
    ]


def test_from_a_picture_and_a_remainder(tmp_path):
    from PIL import Image

    Image.new("RGB", (80, 60), "red").save(tmp_path / "star.png")
    arguments = [f"image={tmp_path}/star.png", "chunks=null", "frames=6", PROMPT]
    assert command(tmp_path, *arguments) == 0
    found = rows(tmp_path / "run")
    assert [(r["latent_frames"], r["given"], r["frames"]) for r in found] == [
        (1, True, 1),
        (3, False, 12),
        (2, False, 8),
    ]


def test_a_step_cache_in_the_chunks(tmp_path, capsys):
    arguments = [
        "timesteps=[1000,750,500,250]",
        "cache=interval",
        "cache.head=1",
        "cache.tail=0",
        "cache.policy.every=4",
        "chunks=2",
    ]
    assert command(tmp_path, PROMPT, *arguments) == 0
    assert [r["steps_skipped"] for r in rows(tmp_path / "run")] == [3, 3]
    assert [r["forwards"] for r in rows(tmp_path / "run")] == [5, 4]
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "3.0 of 4 steps skipped per chunk; at most 2.5x, as the first forward and the clean pass always run"
        in out
    )


def test_an_interrupted_run_leaves_no_video(tmp_path, monkeypatch):
    made = loop.Run.make

    def interrupted(self, index, *rest, **more):
        if index == 2:
            raise KeyboardInterrupt
        return made(self, index, *rest, **more)

    monkeypatch.setattr(loop.Run, "make", interrupted)
    assert command(tmp_path, PROMPT) == 130
    left = {p.name for p in (tmp_path / "run").rglob("*")} if (tmp_path / "run").exists() else set()
    assert not {n for n in left if "mp4" in n or "jsonl" in n or n == "metrics.json"}


def test_verify(tmp_path, capsys):
    assert command(tmp_path, "verify=true", "kv=int8", "kv.window=6", "kv.sink=1") == 0
    out = capsys.readouterr().out
    assert "exact: " in out and "no context" in out and "int8" in out and "3+3+3" in out
    assert not (tmp_path / "run").exists()


def test_verify_fails_where_the_cache_does_not_fit(tmp_path, capsys, monkeypatch):
    """A cache that forgets where chunks are: exit code 1, with the figures."""
    from ditcache.kv.attach import KVAttention

    place = KVAttention.place

    def misplaced(self, rope, args, rotary):
        self.frame_offset = 0
        return place(self, rope, args, rotary)

    monkeypatch.setattr(KVAttention, "place", misplaced)
    assert command(tmp_path, "verify=true") == 1
    assert "verify: cached and masked differ by" in capsys.readouterr().err


MISTAKES = {
    (
        "model=tiny",
    ): "model: Wan generates whole clips; rollout needs a causal model, such as model=tiny_causal",
    (
        "kv.window=4",
        "kv.sink=3",
    ): "kv.window: must hold the sink and a chunk (3 + 3 latent frames), got 4",
    ("kv.window=null", "kv.sink=3"): "kv.sink: has no effect without a window",
    ("kv.positions=relativ",): "kv.positions: no 'relativ'. Did you mean 'relative'?",
    ("kv.codec=int7",): "kv.codec: no 'int7'. Did you mean 'int",
    ("kv.offload=true",): "kv.offload: needs a store with tiers; set store=tiered",
    ("store=tiered",): "store: holds nothing in a rollout without kv.offload=true",
    (
        "kv=int8",
        "kv.offload=true",
        "store=tiered",
    ): "kv.codec: offloaded chunks are encoded by the store",
    (
        "store=tiered",
        "store.gpu=0",
        "store.cpu=1KiB",
        "store.disk=0",
        "kv.offload=true",
    ): "store: its tiers hold 0 MiB, keys and values of the window are 1 MiB",
    ("timesteps=[500,750]",): "timesteps: must fall from at most 1000 to above 0",
    ("timesteps=[]",): "timesteps: must fall",
    ("warp=false", "shift=7"): "shift: has no effect with warp=false",
    ("shift=null",): "shift: timesteps are warped by it; set shift=5 or warp=false",
    ("switch.3=x",): "switch.3: must be a chunk from 1 to 2",
    ("switch.0=x",): "switch.0: must be a chunk from 1 to 2",
    ("switch.1=",): "switch.1: must not be empty",
    ("chunks=0",): "chunks: must be >= 1, got 0",
    ("frames=9",): "frames: give either chunks or frames",
    ("height=50",): "height: must be a multiple of 16, got 50",
    ("negative_prompt=x",): "negative_prompt: has no effect without guidance",
    ("recache=true",): "recache: has no effect without a switch of prompts",
    ("context=recompute", "kv.window=null"): "context: recompute needs a window",
    ("context=clan",): "context: no 'clan'. Did you mean 'clean'?",
    ("model.vae_tiling=true",): "model.vae_tiling: has no effect",
    ("plan=true", "verify=true"): "plan: loads nothing to verify",
    ("cache=cfg_delta",): "cache.cfg: has no effect without guidance",
    ("cache=interval",): "cache: Interval computes all 2 steps of a chunk",
    ("guidance_low=2", "guidance=2"): "guidance_low: this model has one expert",
    (
        "chunks=50",
    ): "chunks: this rollout has 150 latent frames, the model's position table 128; ask for less, or set kv.positions=relative",
    (
        "chunks=50",
        "kv.positions=relative",
        "kv.window=140",
    ): "kv.window: 140 latent frames are more than the model's position table of 128",
    (
        "verify=true",
        "kv.sink=3",
        "kv.positions=relative",
    ): "kv.positions: relative positions with a sink differ from one forward by design",
    ("image=nothing.png",): "image: cannot read nothing.png",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["rollout", *SMALL, *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert MISTAKES[arguments] in error and error.count("\n") == 0, error
    assert not list(tmp_path.rglob("*.mp4"))


def test_generate_refuses_causal_models(capsys):
    assert cli.run(["generate", "model=tiny_causal"]) == 2
    assert (
        "generates chunk by chunk and not whole clips; use `ditcache rollout`"
        in capsys.readouterr().err
    )


def test_help(capsys):
    assert cli.run(["rollout", "--help"]) == 0
    text = capsys.readouterr().out
    assert (
        "kv " in text
        and "int4, int8, rolling" in text
        and "switch" in text
        and "num_frames" not in text
    )
    assert cli.run(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "num_frames" in text and "\n  kv " not in text
