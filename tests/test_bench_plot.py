"""The picture of a load: its bins."""

import numpy as np

from cmjax.bench.load import Record
from cmjax.bench.serving import rate_bins


def test_the_bins_of_a_picture_span_several_calls():
    """Sequences that get four tokens each in calls of a quarter of a second: the rate is even."""
    records = [Record(3, 0.0, [0.25 * (call + 1) for call in range(40)], [4] * 40) for _ in range(8)]
    assert rate_bins(records) == 7  # of 9.75 s
    counts, _ = np.histogram([at for record in records for at in record.chunks], bins=rate_bins(records))
    assert counts.min() > 0.8 * counts.max()


def test_a_long_load_has_at_most_so_many_bins_and_a_short_one_some():
    assert rate_bins([Record(3, 0.0, np.arange(1, 5000, 0.25).tolist())]) == 30
    assert rate_bins([Record(3, 0.0, [0.5, 1.0])]) == 1
    assert rate_bins([Record(3, 0.0, [0.5])]) > 0
    assert rate_bins([]) > 0
