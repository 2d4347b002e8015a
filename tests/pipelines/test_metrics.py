"""PSNR and SSIM against their plain definitions."""

import math

import numpy as np
import pytest

from attnproc.pipelines.metrics import psnr, ssim


@pytest.fixture
def random():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print("seed", seed)
    return np.random.default_rng(seed)


def _plain_ssim(a, b, size):
    """Window by window, as in the paper."""
    offsets = np.arange(size) - size // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for frame_a, frame_b in zip(a, b, strict=True):
        for channel in range(3):
            for row in range(a.shape[1] - size + 1):
                for column in range(a.shape[2] - size + 1):
                    x = frame_a[row : row + size, column : column + size, channel]
                    y = frame_b[row : row + size, column : column + size, channel]
                    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                    var_x = (weights * (x - mean_x) ** 2).sum()
                    var_y = (weights * (y - mean_y) ** 2).sum()
                    both = (weights * (x - mean_x) * (y - mean_y)).sum()
                    values.append(
                        (2 * mean_x * mean_y + 1e-4)
                        * (2 * both + 9e-4)
                        / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
                    )
    return np.mean(values)


@pytest.mark.parametrize(("height", "width", "size"), [(13, 17, 11), (11, 12, 11), (8, 15, 7), (16, 5, 5)])
def test_ssim_is_the_definition(random, height, width, size):
    a = random.random((2, height, width, 3))
    b = np.clip(a + random.normal(0, 0.1, a.shape), 0, 1)
    assert ssim(a, b) == pytest.approx(_plain_ssim(a, b, size), abs=1e-10)
    assert ssim(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(ssim(a, b), abs=1e-5)


def test_equal_videos(random):
    video = random.random((3, 20, 24, 3), dtype=np.float32)
    assert psnr(video, video) == math.inf
    assert ssim(video, video) == pytest.approx(1.0)


def test_psnr_of_a_known_error(random):
    video = random.random((2, 6, 5, 3)) * 0.8
    assert psnr(video + 0.1, video) == pytest.approx(20.0)
    noise = random.normal(0, 0.05, video.shape)
    assert psnr(video + noise, video) == pytest.approx(10 * math.log10(1 / np.mean(noise**2)))


def test_more_noise_is_worse(random):
    video = random.random((2, 32, 32, 3))
    levels = [np.clip(video + random.normal(0, sigma, video.shape), 0, 1) for sigma in (0.02, 0.1, 0.4)]
    for metric in (psnr, ssim):
        values = [metric(level, video) for level in levels]
        assert values == sorted(values, reverse=True)


def test_other_shapes_are_refused(random):
    with pytest.raises(ValueError, match="expected two equal shapes"):
        psnr(random.random((2, 8, 8, 3)), random.random((3, 8, 8, 3)))
    with pytest.raises(ValueError, match="expected two equal shapes"):
        ssim(random.random((8, 8, 3)), random.random((8, 8, 3)))
