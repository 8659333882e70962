"""VMAF (https://github.com/Netflix/vmaf), model v0.6.1, by an ffmpeg that has libvmaf. Knows
nothing of models; no video file is written, frames go through a pipe.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np

from ditcache.metrics.pair import check_pair

LOG = "vmaf.json"
SMALLEST = 32  # pixels a side; libvmaf crashes on 16


def vmaf(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Mean over frames, 0..100. Equal videos score close to 100, seldom exactly 100. NaN if a frame
    holds NaN.

    Frames are rounded to 16-bit RGB and compared as 10-bit YUV 4:4:4 (BT.709). VMAF was fitted to
    people watching compressed full-HD video; on small frames only its order means something.

    reference, candidate: [T, H, W, 3] in 0..1, at least 32 pixels a side. Raises ValueError
    otherwise, or if no ffmpeg has libvmaf.
    """
    check_pair("vmaf", reference, candidate)
    height, width = reference.shape[1:3]
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"vmaf: frames must be at least {SMALLEST} pixels a side, got {(height, width)}"
        )
    if not all(np.isfinite(frame).all() for video in (reference, candidate) for frame in video):
        return math.nan
    with tempfile.TemporaryDirectory() as folder:
        run(command(find_ffmpeg(), height, width), folder, stacked(reference, candidate))
        return mean_score((Path(folder) / LOG).read_text(encoding="utf-8"))


@cache
def find_ffmpeg() -> str:
    """imageio's ffmpeg (IMAGEIO_FFMPEG_EXE if set), else the one on the PATH; whichever comes first
    and has libvmaf. Raises ValueError if none.
    """
    import imageio_ffmpeg

    found = [shutil.which("ffmpeg")]
    with suppress(RuntimeError):  # imageio has none for this platform
        found.insert(0, imageio_ffmpeg.get_ffmpeg_exe())
    programs = list(dict.fromkeys(program for program in found if program))
    for program in programs:
        if has_libvmaf(program):
            return program
    looked = f"looked at {', '.join(programs)}" if programs else "found no ffmpeg at all"
    raise ValueError(
        f"vmaf: no ffmpeg with libvmaf ({looked}); set IMAGEIO_FFMPEG_EXE to one that has it, or "
        "leave out metrics.vmaf=true"
    )


def has_libvmaf(program: str) -> bool:
    try:
        done = subprocess.run([program, "-hide_banner", "-filters"], capture_output=True)
    except OSError:
        return False
    return b" libvmaf " in done.stdout


def command(program: str, height: int, width: int) -> list[str]:
    """Reads frames [2 H, W, 3], the reference above the candidate, from its input and writes LOG
    into its working directory. libvmaf wants the distorted video first.
    """
    to_yuv = "scale=out_color_matrix=bt709:out_range=tv,format=yuv444p10le"
    graph = (
        f"[0:v]split[top][bottom];"
        f"[top]crop={width}:{height}:0:0,{to_yuv}[reference];"
        f"[bottom]crop={width}:{height}:0:{height},{to_yuv}[candidate];"
        f"[candidate][reference]libvmaf=model=version=vmaf_v0.6.1:log_fmt=json:log_path={LOG}"
    )
    return [
        *(program, "-hide_banner", "-nostdin", "-loglevel", "error"),
        *("-f", "rawvideo", "-pix_fmt", "rgb48le", "-video_size", f"{width}x{2 * height}"),
        *("-framerate", "25", "-i", "pipe:0", "-filter_complex", graph, "-f", "null", "-"),
    ]


def stacked(reference: np.ndarray, candidate: np.ndarray) -> Iterator[bytes]:
    """One frame of both videos at a time, reference on top, 16-bit RGB."""
    for pair in zip(reference, candidate, strict=True):
        both = np.concatenate([frame.astype(np.float64) for frame in pair])
        yield (np.clip(both, 0, 1) * 65535 + 0.5).astype("<u2").tobytes()


def run(arguments: list[str], folder: str, chunks: Iterator[bytes]) -> None:
    """Raises ValueError with ffmpeg's last words if it fails."""
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            arguments, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=words
        )
        try:
            with process.stdin as pipe:  # type: ignore[union-attr]
                for chunk in chunks:
                    pipe.write(chunk)
        except BrokenPipeError:  # it gave up; its last words say why
            pass
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
        if process.returncode != 0:
            words.seek(0)
            lines = words.read().decode(errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no message"
            raise ValueError(f"vmaf: {arguments[0]} failed ({process.returncode}): {last}")


def mean_score(log: str) -> float:
    """libvmaf's JSON log -> mean over frames. Raises ValueError if it is something else."""
    try:
        return float(json.loads(log)["pooled_metrics"]["vmaf"]["mean"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"vmaf: libvmaf's log holds no mean score: {log[:80]!r}") from None
