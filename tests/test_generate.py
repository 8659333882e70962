"""`ditcache generate` end to end, through the command line, on the embedded model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

from ditcache import cli
from ditcache.models.base import ZOO

KEYS = {
    "schema",
    "command",
    "model",
    "cache",
    "seed",
    "steps",
    "prompts",
    "timing",
    "compute",
    "state_bytes_peak",
    "video",
}
PROMPT = "a fox's tail (night), schön"


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """Run the command in an empty folder -> its run folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, code=0):
        assert cli.run(["generate", *arguments, f"hydra.run.dir={tmp_path}/run"]) == code
        return tmp_path / "run"

    return run


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_files_and_keys(generate, read_mp4, capsys):
    folder = generate(
        PROMPT, "b, [c]", "cache=taylorseer", "cache.head=3", "steps=9", "compare=true", "seed=4"
    )
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".hydra",
        "config.yaml",
        "metrics.json",
        "steps.jsonl",
        "cache_map.png",
        "contact_sheet.png",
        *(f"{kind}-00{i}.mp4" for kind in ("video", "baseline", "compare") for i in range(2)),
    }
    metrics = metrics_of(folder)
    assert set(metrics) >= KEYS | {"quality", "speedup"}
    assert metrics["schema"] == 1 and metrics["command"] == "generate"
    assert (metrics["model"], metrics["cache"], metrics["seed"], metrics["steps"]) == (
        "tiny",
        "taylorseer",
        4,
        9,
    )
    assert metrics["prompts"] == [PROMPT, "b, [c]"]
    assert set(metrics["timing"]) == {"text_s", "denoise_s", "decode_s", "total_s"}
    assert set(metrics["quality"]) >= {"psnr", "ssim", "psnr_worst_frame"}
    assert set(metrics["speedup"]) >= {"denoise", "total"}
    assert 10 < metrics["quality"]["psnr_worst_frame"] <= metrics["quality"]["psnr"]
    assert metrics["state_bytes_peak"] > 0 and len(metrics["video"]) == 2

    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert len(rows) == metrics["compute"]["units_total"] == 2 * 9 * 2
    assert sum(row["computed"] for row in rows) == metrics["compute"]["units_computed"] < len(rows)
    assert metrics["compute"]["ratio"] == metrics["compute"]["units_computed"] / len(rows)
    assert set(rows[0]) >= {
        "video",
        "step",
        "expert",
        "branch",
        "unit",
        "computed",
        "signal",
        "nbytes",
    }

    frames = read_mp4(folder / "video-000.mp4", 320, 320)
    assert frames.shape == (17, 320, 320, 3)
    out = capsys.readouterr().out
    assert "taylorseer" in out and "dB" in out and str(folder) in out.replace("\n", "")


def test_d27_the_speed_up_shown_is_the_wall_clocks(generate, capsys):
    """What the share of computed blocks would allow stands beside it, as what it is."""
    folder = generate("a red star", "cache=planned", "cache.policy.compute=6", "compare=true")
    metrics, out = metrics_of(folder), capsys.readouterr().out
    measured, allowed = metrics["speedup"]["denoise"], 1 / metrics["compute"]["ratio"]
    assert allowed == pytest.approx(4.0) and measured < 0.95 * allowed
    assert f"{measured:.2f}x" in out and f"allows {allowed:.2f}x" in out
    timing = metrics["timing"]["denoise_s"]
    assert metrics["speedup"]["reached"] == pytest.approx(measured / allowed, rel=1e-3)
    assert timing > 0


def test_without_cache_it_is_diffusers(generate):
    """Latents of the command equal the plain pipeline's, for three prompts in one run and two
    sizes.
    """
    prompts = ["a red star moves left on a blue background", PROMPT, "x"]
    pipe = WanPipeline.from_pretrained(ZOO / "wan-tiny")
    pipe.set_progress_bar_config(disable=True)
    for height, width in ((64, 64), (48, 80)):
        folder = generate(
            *prompts,
            "steps=4",
            "seed=11",
            "save_latents=true",
            f"height={height}",
            f"width={width}",
        )
        for index, prompt in enumerate(prompts):
            expected = pipe(
                prompt,
                height=height,
                width=width,
                num_frames=17,
                num_inference_steps=4,
                guidance_scale=4.0,
                generator=torch.Generator().manual_seed(11),
                output_type="latent",
            ).frames
            assert torch.equal(
                load_file(folder / f"latents-00{index}.safetensors")["latents"], expected
            )
        compute = metrics_of(folder)["compute"]
        assert compute["units_total"] == compute["units_computed"] == 24
        assert compute["ratio"] == compute["block_ratio"] == 1.0


def test_a_comparison_with_itself_is_identical(generate):
    folder = generate("cache=interval", "cache.policy.every=1", "steps=3", "compare=true")
    quality = metrics_of(folder)["quality"]
    assert quality["identical"] and quality["psnr"] is None and quality["ssim"] == pytest.approx(1)


def test_the_second_video_equals_a_fresh_process(generate, tmp_path):
    both = generate(
        "a red star",
        "a blue cross",
        "cache=taylorseer",
        "cache.head=2",
        "steps=8",
        "save_latents=true",
    )
    second = load_file(both / "latents-001.safetensors")["latents"]
    code = "import sys; from ditcache.cli import run; sys.exit(run(sys.argv[1:]))"
    arguments = [
        "generate",
        "a blue cross",
        "cache=taylorseer",
        "cache.head=2",
        "steps=8",
        "save_latents=true",
    ]
    fresh = [
        sys.executable,
        "-c",
        code,
        *arguments,
        f"hydra.run.dir={tmp_path}/fresh",
        "hydra.job.name=generate",
    ]
    assert subprocess.run(fresh, capture_output=True).returncode == 0
    assert torch.equal(load_file(tmp_path / "fresh/latents-000.safetensors")["latents"], second)


def test_a_sweep_runs_every_job_with_the_model_loaded_once(tmp_path, monkeypatch):
    from ditcache.models import load

    loads = []
    real = load.load_pipeline
    monkeypatch.setattr(load, "load_pipeline", lambda model: loads.append(model) or real(model))
    monkeypatch.chdir(tmp_path)
    load.LOADED.clear()
    arguments = [
        "generate",
        "-m",
        "a, red star",
        "cache=interval",
        "cache.policy.every=1,2",
        "steps=3",
    ]
    assert cli.run([*arguments, f"hydra.sweep.dir={tmp_path}/sweep"]) == 0
    assert len(loads) == 1
    ratios = [metrics_of(tmp_path / "sweep" / str(job))["compute"]["ratio"] for job in range(2)]
    assert ratios[0] == 1.0 and metrics_of(tmp_path / "sweep/1")["prompts"] == ["a, red star"]


def test_a_failing_job_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["generate", "-m", "steps=0,2", f"hydra.sweep.dir={tmp_path}/sweep"]) == 2
    assert "job 0: steps: must be >= 1, got 0" in capfd.readouterr().err
    assert (tmp_path / "sweep/1/metrics.json").is_file()
    assert not (tmp_path / "sweep/0").exists()


def test_prompts_from_a_file(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "# a comment\na red star\n\nschön, 'quoted' ${x}\n", encoding="utf-8"
    )
    folder = generate("prompt_file=prompts.txt", "steps=1")
    assert metrics_of(folder)["prompts"] == ["a red star", "schön, 'quoted' ${x}"]


def test_show_the_configuration(capsys):
    assert cli.run(["generate", "--cfg", "job", "cache=taylorseer"]) == 0
    assert "every:" in capsys.readouterr().out


def test_an_interrupted_run_leaves_nothing_under_a_final_name(
    generate, tmp_path, monkeypatch, capsys
):
    def write_half_and_stop(frames, path, **settings):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.Image.Image.save", write_half_and_stop)
    generate("steps=1", code=130)
    assert "interrupted" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".hydra", "config.yaml", "steps.jsonl", "video-000.mp4"}


def test_a_full_disk_is_one_line(generate, tmp_path, monkeypatch, capsys):
    def no_space(frames, path, **settings):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", no_space)
    generate("steps=1", code=2)
    error = capsys.readouterr().err
    assert "cache_map.png: No space left on device" in error and len(error.splitlines()) == 1
    assert not list((tmp_path / "run").glob(".*partial*"))


def test_a_mistake_never_touches_what_was_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/mine.log").write_text("mine")
    (tmp_path / "empty").mkdir()
    for folder in ("logs", "empty", "empty/new/deep"):
        assert cli.run(["generate", "steps=0", f"hydra.run.dir={folder}"]) == 2
    kept = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert kept == ["empty", "logs", "logs/mine.log"]


@pytest.mark.parametrize("content", [b"not a picture", None])
def test_a_picture_that_cannot_be_read(checkpoints, tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    if content:
        (tmp_path / "my cat (1).png").write_bytes(content)
    arguments = [
        "model=wan2.2_i2v",
        f"model.path={checkpoints['wan2.2_i2v']}",
        "image=my cat (1).png",
    ]
    assert cli.run(["generate", *arguments, "height=32", "width=32", "num_frames=5"]) == 2
    assert "my cat (1).png" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_image_to_video_from_the_command_line(checkpoints, generate, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 40), "red").save(tmp_path / "cat.png")
    folder = generate(
        "the cat yawns", "model=wan2.2_i2v", f"model.path={checkpoints['wan2.2_i2v']}", "image=cat.png",
        "model.dtype=float32", "height=32", "width=32", "num_frames=5", "steps=8", "cache=interval",
        "cache.head=1", "compare=true",
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert {row["expert"] for row in rows} == {"transformer", "transformer_2"}
    assert metrics_of(folder)["compute"]["ratio"] < 1


def test_settings_for_the_low_noise_expert_alone(checkpoints, generate):
    model = ["model=wan2.2_t2v", f"model.path={checkpoints['wan2.2_t2v']}", "model.dtype=float32"]
    model += ["model.device=cpu", "height=32", "width=48", "num_frames=5", "steps=12", "a cat"]
    cache = ["cache=interval", "cache.head=1", "cache.policy.every=2"]

    def skipped(*more):
        folder = generate(*model, *cache, *more)
        rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        assert rows
        return {
            expert: sum(not row["computed"] for row in rows if row["expert"] == expert)
            for expert in ("transformer", "transformer_2")
        }

    same, fewer = skipped(), skipped("cache.low.policy.every=1")
    assert same["transformer"] == fewer["transformer"] > 0
    assert same["transformer_2"] > fewer["transformer_2"] == 0
    other = skipped("cache.low=fbcache", "cache.low.policy.threshold=9", "cache.low.max_skips=1")
    assert other["transformer"] == same["transformer"] and other["transformer_2"] > 0
    hold = skipped("cache=taylorseer", "cache.low=interval", "cache.low.head=1")
    assert hold["transformer_2"] > 0  # the same class with another forecaster


def test_a_folder_that_was_there_stays(tmp_path, monkeypatch):
    """Also under a name that is not the shortest."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("mine: true")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert cli.run(["generate", "plan=true", "hydra.run.dir=../out"]) == 0
    assert cli.run(["generate", "steps=0", "hydra.run.dir=../out"]) == 2
    assert (tmp_path / "out" / "config.yaml").read_text() == "mine: true"


def test_image_conditioned_members_start_from_their_own_picture(generate):
    folder = generate("model=tiny_chronoedit", "prompts=edits", "steps=4")
    assert len(metrics_of(folder)["video"]) == 4
    assert len(list(folder.glob("video-*.mp4"))) == 4


def test_a_folder_of_pictures_is_one_per_prompt(generate, tmp_path, capsys):
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, colour in (("b.png", "red"), ("a.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(pictures / name)
    words = ["model=tiny_i2v", "steps=4", f"image={pictures}", "save_latents=true"]
    folder = generate("a red star", "a blue star", *words)
    latents = [load_file(folder / f"latents-00{i}.safetensors")["latents"] for i in range(2)]
    assert not torch.equal(*latents)
    generate("one prompt", *words, code=2)
    assert "holds 2 pictures for 1 prompts; needs one each" in capsys.readouterr().err
