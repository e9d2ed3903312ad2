import numpy as np
import pytest

from hf_accel.optim.learning_rate.linear_to_zero import LinearToZero


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3])
def test_it_is_the_interpolation_of_its_corners(warmup):
    schedule = LinearToZero(warmup=warmup).schedule
    grid = np.linspace(0, 1, 401)
    corners = ([0, warmup, 1], [0, 1, 0]) if warmup else ([0, 1], [1, 0])
    np.testing.assert_allclose([schedule(p) for p in grid], np.interp(grid, *corners), atol=1e-12)
    assert schedule(1.0) == 0.0


def test_a_bad_value_names_itself():
    with pytest.raises(ValueError, match=r"LinearToZero\(warmup=1.0\): warmup must be >= 0 and < 1"):
        LinearToZero(warmup=1.0)
