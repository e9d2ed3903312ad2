from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_accel.data.regularization.cut_mix import draw_box, paste


def test_pasting_is_a_loop():
    images, others = torch.rand(4, 3, 6, 9), torch.rand(4, 3, 6, 9)
    boxes = [(0, 6, 0, 9), (2, 2, 3, 5), (1, 4, 2, 8), (5, 6, 8, 9)]
    pasted, shares = paste(images, others, boxes)
    for i, (top, bottom, left, right) in enumerate(boxes):
        expected = images[i].clone()
        for y in range(top, bottom):
            for x in range(left, right):
                expected[:, y, x] = others[i, :, y, x]
        assert torch.equal(pasted[i], expected)
        assert shares[i].item() == pytest.approx(float(1 - Fraction((bottom - top) * (right - left), 54)))


def test_boxes_lie_in_the_image_and_have_the_papers_area():
    """Far from the borders a box has the share 1 - lam of the image, and E[1 - lam] = 1/2 for every alpha."""
    generator = np.random.default_rng(0)
    areas, whole = [], []
    for _ in range(4000):
        top, bottom, left, right = draw_box(generator, 1.0, 200, 300)
        assert 0 <= top <= bottom <= 200 and 0 <= left <= right <= 300
        areas.append((bottom - top) * (right - left) / 60000)
        if top > 0 and left > 0 and bottom < 200 and right < 300:
            whole.append(((bottom - top) / 200) / max((right - left) / 300, 1e-9))
    # With lam uniform and the center too, a side of share s keeps s - s^2 / 4 of itself on average: the area's mean is
    # the integral of (sqrt(u) - u / 4)^2 over u in [0, 1].
    expected = 1 / 2 - 2 / 4 * 2 / 5 + 1 / 16 / 3
    assert np.mean(areas) == pytest.approx(expected, abs=4 * np.std(areas) / 4000**0.5 + 0.005)
    assert np.median(whole) == pytest.approx(1.0, abs=0.05)
