"""What a candidate does wrong over time, on raw float frames. Knows nothing of models or files."""

import numpy as np

from ditcache.metrics.pair import check_pair, frame_pairs

FLOOR = (1 / 255) ** 2  # energy of second differences of one 8-bit level, which no display shows


def temporal(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Temporal difference error: mean over pixels and neighbouring frames of
    |(candidate[t+1] - candidate[t]) - (reference[t+1] - reference[t])|, in pixel values (0..1).

    0 if the candidate moves exactly as the reference does. Absolute rather than squared: one jump
    at a moving edge, which PSNR already squares, shall not hide unrest everywhere else.
    Blind to an error that stands still (a constant change of colour) and to whether it is one
    jump or a tremble: that is `flicker`.

    reference, candidate: [T, H, W, 3] in 0..1, T >= 2. Raises ValueError otherwise.
    """
    pairs = frame_pairs("temporal", reference, candidate)
    at_least("temporal", 2, reference)
    errors: list[float] = []
    before = None
    for a, b in pairs:
        error = b - a
        if before is not None:
            errors.append(np.abs(error - before).mean())
        before = error
    return float(np.mean(errors))


def flicker(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Extra flicker of the candidate: how much larger than the reference's its root mean square
    second difference in time, x[t-1] - 2 x[t] + x[t+1], is; 0.5 means 1.5 times, 0 not larger.

    The second difference vanishes for still pixels and even ramps and is largest for pixels that
    alternate, hence tells flicker from smooth change without estimating motion:
    max(0, sqrt((E_candidate + f) / (E_reference + f)) - 1), E its mean square, f that of one 8-bit
    level, which keeps still references finite.
    Blind to lost motion (a frozen candidate scores 0; `temporal` sees it), to slow drift, to where
    in the frame it flickers, and to flicker well below the reference's own motion. Faster motion
    counts as flicker.

    reference, candidate: [T, H, W, 3] in 0..1, T >= 3. Raises ValueError otherwise.
    """
    check_pair("flicker", reference, candidate)
    at_least("flicker", 3, reference)
    energies = [second_difference_energy(video) + FLOOR for video in (reference, candidate)]
    return float(np.maximum(0, np.sqrt(energies[1] / energies[0]) - 1))


def second_difference_energy(frames: np.ndarray) -> np.float64:
    """Mean square of x[t-1] - 2 x[t] + x[t+1] over frames [T, H, W, 3]."""
    squares = []
    for t in range(1, len(frames) - 1):
        before, now, after = (frame.astype(np.float64) for frame in frames[t - 1 : t + 2])
        squares.append(((before - 2 * now + after) ** 2).mean())
    return np.float64(np.mean(squares))


def at_least(metric: str, count: int, frames: np.ndarray) -> None:
    if len(frames) < count:
        raise ValueError(f"{metric}: needs at least {count} frames, got {len(frames)}")
