import numpy as np
import torch

from pipelines.feed import Feed
from pipelines.stream import Batch
from tests.pipelines.states import Given


def test_what_goes_in_comes_out_in_order_with_an_account() -> None:
    image = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    image.flags.writeable = False  # as Ray Data hands it out
    batches = [Batch(np.array([i, i + 1]), np.array([7, 8]), np.array([-1, 3]), image + i, i, 2 * i, i != 2)
               for i in range(3)]  # fmt: skip
    feed = Feed(batches, torch.device("cpu"))
    for i, (position, label, pixels, counted) in enumerate(feed):
        assert position.tolist() == [i, i + 1] and label.tolist() == [-1, 3]
        assert np.array_equal(pixels.numpy(), image + i)
        assert counted == (i != 2)
        pixels.zero_()  # its own memory
    assert (feed.replaced, feed.retried) == (0 + 1 + 2, 0 + 2 + 4)
    assert feed.waited_s > 0
    assert batches[1].image.any()
    feed.reset()
    assert (feed.replaced, feed.retried, feed.waited_s) == (0, 0, 0)


def test_what_tests_feed_is_what_the_stream_gives() -> None:
    assert Given._fields == Batch._fields and Given._field_defaults == Batch._field_defaults
