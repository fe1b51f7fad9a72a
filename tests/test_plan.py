"""A step's plan: which samples make a step, which rank computes which of them, and in which micro-batches.

Property-based: hypothesis draws the same examples everywhere. The last tests hold the figures of DESIGN.md.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataset import LOWEST_COST, samples_of_step, split_into_micro_batches, split_over_ranks

draws = settings(max_examples=200, deadline=None, derandomize=True)
manifest_sizes = st.integers(1, 40)
step_sizes = st.integers(1, 100)  # often more than the manifest has
epochs = st.integers(1, 5)
seeds = st.integers(0, 2**32)
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


def stream(num_samples, samples_per_step, seed, num_steps):
    """The samples of a run's first steps, one after the other."""
    planned = [samples_of_step(step, num_samples, samples_per_step, seed) for step in range(num_steps)]
    assert all(len(samples) == samples_per_step for samples in planned)
    return list(itertools.chain(*planned))


def positions_of(lengths, cut):
    """Padded positions of each micro-batch."""
    return [max(lengths[i] for i in micro_batch) * len(micro_batch) for micro_batch in cut]


def cost_of(lengths, cut):
    """What a rank's micro-batches cost, in positions."""
    return sum(max(LOWEST_COST, positions) for positions in positions_of(lengths, cut))


@draws
@given(manifest_sizes, step_sizes, epochs, seeds)
def test_each_sample_appears_exactly_once_an_epoch(num_samples, samples_per_step, epochs, seed):
    """Catches a last step that is dropped or filled up from its own epoch, and a loss between two epochs."""
    num_steps = math.ceil(epochs * num_samples / samples_per_step)
    samples = stream(num_samples, samples_per_step, seed, num_steps)
    assert epochs * num_samples <= len(samples) < epochs * num_samples + samples_per_step
    for epoch in range(epochs):
        of_epoch = samples[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(of_epoch) == list(range(num_samples))


@draws
@given(manifest_sizes, step_sizes, step_sizes, seeds)
def test_order_depends_on_seed_and_epoch_alone(num_samples, one_size, another_size, seed):
    """Catches an order that is drawn from a global generator, or anew for each step, or by the step's size.

    Ranks, lengths and batch_size cannot change it: samples_of_step does not know them.
    """
    streams = []
    for samples_per_step in (one_size, another_size):
        np.random.seed(samples_per_step)
        torch.manual_seed(samples_per_step)
        streams.append(stream(num_samples, samples_per_step, seed, num_steps=3))
    both = min(len(samples) for samples in streams)
    assert streams[0][:both] == streams[1][:both]
    for epoch in range(both // num_samples):
        order = np.random.default_rng((seed, epoch)).permutation(num_samples).tolist()
        assert streams[0][epoch * num_samples :][:num_samples] == order


def test_order_differs_between_epochs_and_seeds():
    """Catches one order for every epoch, or a seed that is not used. Two of 100! orders do not coincide."""
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            orders.add(tuple(samples_of_step(epoch, 100, 100, seed)))
    assert len(orders) == 9


@pytest.mark.parametrize(("num_samples", "samples_per_step"), [(10, 4), (3, 8), (8, 8)])
def test_resuming_continues_the_same_steps(num_samples, samples_per_step):
    """Catches a plan that starts its epoch again, or remembers other steps, when it begins in the middle."""
    lengths = list(range(1, num_samples + 1))

    def plan(step):
        samples = samples_of_step(step, num_samples, samples_per_step, seed=7)
        return split_over_ranks(samples, lengths, world_size=2)

    whole = [plan(step) for step in range(9)]
    for first in reversed(range(9)):
        assert [plan(step) for step in range(first, 9)] == whole[first:]


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
    """Catches ranks that begin one sample late or early. No sample is longer than a rank's even share."""
    shares = split_over_ranks(list(range(len(lengths))), lengths, world_size)
    borders = np.cumsum([0, *sorted(lengths, reverse=True)])
    loads = [sum(lengths[sample] for sample in share) for share in shares]
    for rank, border in enumerate(np.cumsum(loads), start=1):
        even = rank * sum(lengths) / world_size
        assert abs(border - even) == pytest.approx(min(abs(borders - even)))


def test_a_giant_does_not_starve_the_ranks_that_follow():
    """Catches ranks without a sample where one is longer than all others together."""
    assert split_over_ranks([0, 1, 2, 3], [9000, 1, 1, 1], 4) == [[0], [1], [2], [3]]
    assert split_over_ranks([0, 1, 2, 3], [9000, 9000, 1, 1], 3) == [[0], [1], [2, 3]]
    assert split_over_ranks([0, 1, 1, 0], [5, 5], 2) == [[0, 1], [1, 0]]


@draws
@given(runs, limits)
def test_micro_batches_share_the_run_within_max_tokens(lengths, max_tokens):
    """Catches a sample that is lost or computed twice, and a micro-batch that would not fit into memory."""
    cut = split_into_micro_batches(lengths, max_tokens, batch_size=1)
    assert list(itertools.chain(*cut)) == list(range(len(lengths)))
    for micro_batch, positions in zip(cut, positions_of(lengths, cut), strict=True):
        assert len(micro_batch) == 1 or positions <= max_tokens


@draws
@given(runs, st.integers(1, 8), st.sampled_from([None, 0]))
def test_without_max_tokens_micro_batches_hold_batch_size_samples(lengths, batch_size, max_tokens):
    cut = split_into_micro_batches(lengths, max_tokens, batch_size)
    assert list(itertools.chain(*cut)) == list(range(len(lengths)))
    assert all(len(micro_batch) == batch_size for micro_batch in cut[:-1])
    assert 1 <= len(cut[-1]) <= batch_size


@draws
@given(runs.map(lambda lengths: lengths[-8:]), limits)
@example([1000, 1000], 2000)  # exactly max_tokens
def test_no_cut_is_cheaper(lengths, max_tokens):
    """Catches a greedy cut, and costs without the floor: all cuts of up to 8 samples are tried."""
    costs = []
    for is_border in itertools.product([False, True], repeat=len(lengths) - 1):
        inner = [i for i, chosen in enumerate(is_border, start=1) if chosen]
        cut = [range(first, end) for first, end in itertools.pairwise([0, *inner, len(lengths)])]
        pairs = zip(cut, positions_of(lengths, cut), strict=True)
        if all(len(micro_batch) == 1 or positions <= max_tokens for micro_batch, positions in pairs):
            costs.append(cost_of(lengths, cut))
    assert cost_of(lengths, split_into_micro_batches(lengths, max_tokens, batch_size=1)) == min(costs)


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
    ratios = []
    for step in range(100):
        samples = samples_of_step(step, len(lengths), samples_per_step, seed=0)
        padded = []
        for share in split_over_ranks(samples, lengths, world_size):
            of_share = [lengths[sample] for sample in share]
            cut = split_into_micro_batches(of_share, max_tokens, batch_size=2)
            padded.append(sum(positions_of(of_share, cut)))
        even_share = sum(lengths[sample] for sample in samples) / world_size
        ratios.append(max(padded) / even_share)
    return np.mean(ratios)


@pytest.mark.parametrize("distribution", ["normal", "log-normal"])
@pytest.mark.parametrize("max_tokens", [8192, 16384])
def test_slowest_of_8_ranks_computes_8_percent_more_than_its_share(distribution, max_tokens):
    """Catches padding and waiting. Samples dealt to the idlest rank, cut greedily: 1.3 to 2.3."""
    assert slowest_rank(make_lengths(distribution), 8, 128, max_tokens) <= 1.08


@pytest.mark.parametrize(("distribution", "at_most"), [("normal", 1.12), ("log-normal", 1.17)])
def test_slowest_of_8_ranks_with_half_the_samples(distribution, at_most):
    """Fewer samples leave less choice. Dealt to the idlest rank and cut greedily: 1.5; 2.1."""
    assert slowest_rank(make_lengths(distribution), 8, 64, 8192) <= at_most
