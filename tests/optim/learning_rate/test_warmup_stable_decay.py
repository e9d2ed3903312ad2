import numpy as np
import pytest

from hf_accel.optim.learning_rate.warmup_stable_decay import WarmupStableDecay


@pytest.mark.parametrize(("warmup", "cooldown"), [(0.05, 0.2), (0.0, 1.0), (0.4, 0.6), (0.1, 0.3)])
def test_it_is_the_published_shape(warmup, cooldown):
    schedule = WarmupStableDecay(warmup=warmup, cooldown=cooldown).schedule
    grid = np.linspace(0, 1, 1001)
    rise = np.minimum(grid / warmup, 1) if warmup else np.ones_like(grid)
    fall = 1 - np.sqrt(np.clip((grid - (1 - cooldown)) / cooldown, 0, 1))
    np.testing.assert_allclose([schedule(p) for p in grid], np.minimum(rise, fall), atol=1e-7)
    assert schedule(1.0) == 0.0 and schedule(1 - cooldown) == pytest.approx(1.0, abs=1e-7)


def test_warmup_and_cooldown_must_fit():
    with pytest.raises(ValueError, match=r"WarmupStableDecay\(warmup=0.5, cooldown=0.6\): warmup \+ cooldown must be"):
        WarmupStableDecay(warmup=0.5, cooldown=0.6)
