"""Pictures are reduced to the means of their pixels, alone or together."""

import numpy as np
import pytest

from scd.data.reduce import reduce_pictures


def test_a_picture_is_reduced_to_means_and_its_middle_kept():
    picture = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(1, 48, 64, 3).astype(np.uint8)
    assert np.shares_memory(reduce_pictures(picture, None), picture)
    means = picture.reshape(1, 24, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(reduce_pictures(picture, (24, 24)) - means[:, :, 4:28]).max() <= 0.5
    assert reduce_pictures(picture, (48, 10)).shape == (1, 48, 10, 3)


@pytest.mark.parametrize("size", [(12, 16), (16, 12), (7, 5), (96, 128), (24, 32), (48, 64)])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_pictures_reduced_together_and_with_a_fourth_value_are_those_of_one(size, count):
    pictures = np.random.default_rng(0).integers(0, 256, (count, 48, 64, 4), np.uint8)
    alone = np.concatenate([reduce_pictures(one[None, ..., :3].copy(), size) for one in pictures])
    assert alone.shape == (count, *size, 3)
    np.testing.assert_array_equal(reduce_pictures(pictures, size), alone)
    np.testing.assert_array_equal(reduce_pictures(pictures[..., :3].copy(), size), alone)
