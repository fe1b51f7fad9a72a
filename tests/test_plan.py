"""A step's plan: which samples make a step, which rank computes which of them, and in which micro-batches.

Property-based: hypothesis draws the same examples everywhere. The last tests hold what padding costs.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import split_evenly, split_into_micro_batches

draws = settings(max_examples=200, deadline=None, derandomize=True)
runs = st.lists(st.integers(1, 3000), min_size=1, max_size=40).map(
    lambda lengths: sorted(lengths, reverse=True)
)
limits = st.integers(1, 20_000)


@st.composite
def steps(draw):
    """(samples of a step, lengths of the manifest, ranks): samples may repeat, and each rank can have one."""
    lengths = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
    world_size = draw(st.integers(1, 8))
    sample = st.integers(0, len(lengths) - 1)
    return draw(st.lists(sample, min_size=world_size, max_size=60)), lengths, world_size


def split_over_ranks(samples, lengths, world_size):
    """Each rank's share of a step, as trainer.train makes it."""
    return split_evenly(sorted(samples, key=lengths.__getitem__, reverse=True), lengths, world_size)


def positions_of(lengths, cut):
    """Padded positions of each micro-batch."""
    return [max(lengths[i] for i in micro_batch) * len(micro_batch) for micro_batch in cut]


@draws
@given(steps())
def test_ranks_share_the_step_as_runs_of_neighbours(step):
    """Catches a sample that is lost or given twice, a rank without one, and ties that change their order."""
    samples, lengths, world_size = step
    shares = split_over_ranks(samples, lengths, world_size)
    assert len(shares) == world_size and all(shares)
    assert list(itertools.chain(*shares)) == sorted(samples, key=lambda sample: -lengths[sample])


@draws
@given(st.lists(st.integers(100, 300), min_size=24, max_size=60), st.integers(1, 8))
def test_ranks_are_cut_where_an_even_cut_is_nearest(lengths, world_size):
    """Catches ranks that begin one sample late or early. No sample is longer than a rank's even share.

    Where two borders are equally near, rounding in float64 chooses.
    """
    shares = split_over_ranks(list(range(len(lengths))), lengths, world_size)
    borders = np.cumsum([0, *sorted(lengths, reverse=True)])
    loads = [sum(lengths[sample] for sample in share) for share in shares]
    for rank, border in enumerate(np.cumsum(loads), start=1):
        even = rank * sum(lengths) / world_size
        rounding = 10 * np.finfo(np.float64).eps * sum(lengths)
        assert abs(border - even) == pytest.approx(min(abs(borders - even)), abs=rounding)


def test_a_giant_does_not_starve_the_ranks_that_follow():
    """Catches ranks without a sample where one is longer than all others together."""
    assert split_over_ranks([0, 1, 2, 3], [9000, 1, 1, 1], 4) == [[0], [1], [2], [3]]
    assert split_over_ranks([0, 1, 2, 3], [9000, 9000, 1, 1], 3) == [[0], [1], [2, 3]]
    assert split_over_ranks([0, 1, 1, 0], [5, 5], 2) == [[0, 1], [1, 0]]


@draws
@given(runs, limits)
def test_micro_batches_share_the_run_within_max_tokens(lengths, max_tokens):
    """Catches a sample that is lost or computed twice, and a micro-batch that would not fit into memory."""
    cut = split_into_micro_batches(list(range(len(lengths))), lengths, max_tokens)
    assert list(itertools.chain(*cut)) == list(range(len(lengths)))
    for micro_batch, positions in zip(cut, positions_of(lengths, cut), strict=True):
        assert len(micro_batch) == 1 or positions <= max_tokens


def make_lengths(distribution, num_samples=12_800):
    """Positions of samples: 25 for a second of the target and of its reference, about 100 for the text."""
    rng = np.random.default_rng(1)
    size = (2, num_samples)
    seconds = (
        rng.normal(7.2, 2.5, size) if distribution == "normal" else rng.lognormal(np.log(5.5), 0.6, size)
    )
    text = rng.normal(100, 25, num_samples).clip(30)
    return (25 * seconds.clip(1, 30).sum(axis=0) + text).round().astype(int).tolist()


def slowest_rank(lengths, world_size, samples_per_step, max_tokens):
    """Padded positions of the slowest rank, over an even share of the unpadded ones: mean over 100 steps."""
    ratios, order = [], np.random.default_rng(0).permutation(len(lengths))
    for step in range(100):
        samples = order[step * samples_per_step :][:samples_per_step].tolist()
        padded = []
        for share in split_over_ranks(samples, lengths, world_size):
            cut = split_into_micro_batches(share, lengths, max_tokens)
            padded.append(sum(positions_of(lengths, cut)))
        even_share = sum(lengths[sample] for sample in samples) / world_size
        ratios.append(max(padded) / even_share)
    return np.mean(ratios)


@pytest.mark.parametrize("distribution", ["normal", "log-normal"])
@pytest.mark.parametrize("max_tokens", [8192, 16384])
def test_slowest_of_8_ranks_computes_8_percent_more_than_its_share(distribution, max_tokens):
    """Catches padding and waiting. Samples dealt to the idlest rank, cut greedily: 1.3 to 2.3.

    Lengths are whole numbers, which every processor adds alike. Another version of NumPy may draw others:
    over such draws the figure has a mean of 1.082 at most, and a standard deviation of 0.002.
    """
    assert slowest_rank(make_lengths(distribution), 8, 128, max_tokens) <= 1.09


@pytest.mark.parametrize(("distribution", "at_most"), [("normal", 1.13), ("log-normal", 1.18)])
def test_slowest_of_8_ranks_with_half_the_samples(distribution, at_most):
    """Fewer samples leave less choice. Dealt to the idlest rank and cut greedily: 1.5; 2.1.

    Over draws the figures have means of 1.115 and 1.161, and standard deviations of 0.003.
    """
    assert slowest_rank(make_lengths(distribution), 8, 64, 8192) <= at_most


def test_a_sample_that_is_too_long_stands_alone():
    """Catches one such sample that makes all others of the rank's share micro-batches of their own."""
    assert [len(part) for part in split_into_micro_batches(list(range(16)), [9000] + [400] * 15, 8192)] == [
        1,
        15,
    ]
    cut = split_into_micro_batches(list(range(16)), [1200] + [300] * 15, 1024)
    assert max(map(len, cut)) > 1 and all(len(part) == 1 or len(part) * 300 <= 1024 for part in cut)
