"""VMAF: what is sent to ffmpeg and read from it, by a stand-in; real scores where libvmaf is there."""

import json
import math
import sys

import imageio_ffmpeg
import numpy as np
import pytest

from ditcache.metrics import vmaf as module
from ditcache.metrics.vmaf import command, find_ffmpeg, mean_score, vmaf

RNG = np.random.default_rng(0)
WORLD = np.kron(RNG.random((16, 20, 3)), np.ones((8, 8, 1)))
CLIP = np.stack([WORLD[:96, t : t + 130] for t in range(5)]).astype(np.float32)
NOISE = RNG.standard_normal(CLIP.shape).astype(np.float32)

try:
    find_ffmpeg()
    HAVE_LIBVMAF = True
except ValueError:
    HAVE_LIBVMAF = False
real = pytest.mark.skipif(not HAVE_LIBVMAF, reason="no ffmpeg with libvmaf")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in ffmpeg's place: lists `filters`, keeps what it was sent, writes `log`, runs
    `last`.
    """

    def make(filters=" .. libvmaf VV->V ", log="{}", last=""):
        program = tmp_path / "ffmpeg"
        program.write_text(
            f"#!{sys.executable}\n"
            "import pathlib, sys\n"
            f"if '-filters' in sys.argv: print({filters!r}); sys.exit()\n"
            f"pathlib.Path({str(tmp_path / 'sent')!r}).write_bytes(sys.stdin.buffer.read())\n"
            f"pathlib.Path('vmaf.json').write_text({log!r})\n"
            f"{last}\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(program))
        monkeypatch.setenv("PATH", str(tmp_path))
        find_ffmpeg.cache_clear()
        return tmp_path

    yield make
    find_ffmpeg.cache_clear()


def test_sends_both_videos_as_one_and_reads_the_mean(stand_in):
    folder = stand_in(log=json.dumps({"pooled_metrics": {"vmaf": {"mean": 87.5, "min": 3}}}))
    assert vmaf(CLIP, 1 - CLIP) == 87.5
    sent = np.frombuffer((folder / "sent").read_bytes(), "<u2").reshape(5, 2 * 96, 130, 3)
    assert np.abs(sent[:, :96] / 65535 - CLIP).max() < 1e-5
    assert np.abs(sent[:, 96:] / 65535 - (1 - CLIP)).max() < 1e-5


def test_the_command_names_size_model_and_order():
    text = " ".join(command("ffmpeg", 96, 130))
    assert "-pix_fmt rgb48le -video_size 130x192" in text
    assert "[top]crop=130:96:0:0" in text and "[bottom]crop=130:96:0:96" in text
    assert "[candidate][reference]libvmaf=model=version=vmaf_v0.6.1:log_fmt=json" in text


def test_no_libvmaf_says_what_to_leave_out(stand_in, monkeypatch):
    stand_in(filters=" .. psnr VV->V ")
    with pytest.raises(
        ValueError,
        match=r"vmaf: no ffmpeg with libvmaf \(looked at .*ffmpeg\); .*leave out metrics.vmaf=true",
    ):
        vmaf(CLIP, CLIP)

    def nothing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", nothing)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"\(found no ffmpeg at all\)"):
        vmaf(CLIP, CLIP)


def test_the_ffmpeg_on_the_path_is_second_choice(stand_in, monkeypatch):
    folder = stand_in()
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(folder / "missing"))
    assert find_ffmpeg() == str(folder / "ffmpeg")


def test_a_failing_ffmpeg_says_why(stand_in):
    stand_in(last="sys.exit('first\\nno such model')")
    with pytest.raises(ValueError, match=r"vmaf: .*ffmpeg failed \(1\): no such model$"):
        vmaf(CLIP, CLIP)


def test_an_ffmpeg_that_gives_up_early_says_why(stand_in):
    stand_in()
    program = find_ffmpeg()
    long = iter([bytes(1 << 20)] * 8)
    with pytest.raises(ValueError, match=r"failed \(3\): no$"):
        module.run(
            [sys.executable, "-c", "import sys; print('no', file=sys.stderr); sys.exit(3)"],
            ".",
            long,
        )
    assert program


@pytest.mark.parametrize("log", ["", "{}", "[]", '{"pooled_metrics": {"vmaf": 3}}'])
def test_a_log_without_a_score_is_refused(log):
    with pytest.raises(ValueError, match="vmaf: libvmaf's log holds no mean score"):
        mean_score(log)


def test_frames_are_refused_and_nan_stays_nan():
    with pytest.raises(
        ValueError, match=r"vmaf: reference is \(5, .*compare videos of equal shape"
    ):
        vmaf(CLIP, CLIP[:2])
    with pytest.raises(ValueError, match=r"vmaf: .* at least 32 pixels a side, got \(16, 130\)"):
        vmaf(CLIP[:, :16], CLIP[:, :16])
    assert math.isnan(vmaf(CLIP, CLIP * np.float32(np.nan)))


@real
def test_identical_is_near_100_and_worse_is_lower():
    blurred = (CLIP + np.roll(CLIP, 4, 1) + np.roll(CLIP, 4, 2)) / 3
    scores = [vmaf(CLIP, other) for other in (CLIP, CLIP + 0.05 * NOISE, blurred, 1 - CLIP)]
    assert scores[0] > 97 and scores == sorted(scores, reverse=True)
    assert scores[2] < 50 and scores[3] < 5


@real
def test_the_smallest_and_odd_frames_are_scored():
    assert 0 <= vmaf(CLIP[:2, :32, :33], CLIP[:2, :32, :33]) <= 100
