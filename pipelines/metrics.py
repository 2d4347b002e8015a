"""How close one video is to another: PSNR and SSIM.

Videos are float arrays (frames, height, width, 3) with values from 0.0 to 1.0.
"""

import math

import numpy as np

# Wang, Bovik, Sheikh, Simoncelli 2004: an 11 x 11 Gaussian window of 1.5 pixels, and constants for a range of 1.0.
WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio over all values of both videos, in dB; infinite if they are equal."""
    _check(video, reference)
    error = float(np.mean((video.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return math.inf if error == 0.0 else -10.0 * math.log10(error)


def ssim(video: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity, from -1.0 to 1.0 (equal): the mean over frames, channels and whole windows.

    Frames smaller than the window are compared in one window of the largest odd size that fits.
    """
    _check(video, reference)
    total = sum(_frame_ssim(a, b) for a, b in zip(video, reference, strict=True))
    return total / len(video)


def _frame_ssim(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    weights = _window(min(*a.shape[:2], WINDOW))
    mean_a, mean_b = _smooth(a, weights), _smooth(b, weights)
    var_a = _smooth(a * a, weights) - mean_a**2
    var_b = _smooth(b * b, weights) - mean_b**2
    covariance = _smooth(a * b, weights) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return float(np.mean(luminance * structure))


def _window(most: int) -> np.ndarray:
    size = most if most % 2 else most - 1
    offsets = np.arange(size) - size // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _smooth(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of each whole window of an image (height, width, channels)."""
    rows = np.lib.stride_tricks.sliding_window_view(image, len(weights), axis=0) @ weights
    return np.lib.stride_tricks.sliding_window_view(rows, len(weights), axis=1) @ weights


def _check(video: np.ndarray, reference: np.ndarray) -> None:
    if video.shape != reference.shape or video.ndim != 4 or video.size == 0:
        raise ValueError(
            f"got videos of shapes {video.shape} and {reference.shape}; expected two equal shapes (frames, height, "
            "width, channels). Make both with the same size and number of frames."
        )
