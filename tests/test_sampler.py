"""Every sample once: what deal_steps deals to each rank in each step (fidelity, property 3).

Property-based: 1,200 draws of (lengths, batch, accumulation, ranks, seed, epoch), the same everywhere.
"""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import deal_steps

draws = settings(max_examples=400, deadline=None, derandomize=True)
lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=40)  # positions of each entry
batch_sizes = accumulations = st.integers(1, 4)
world_sizes = st.integers(1, 8)
seeds = st.integers(0, 2**32)
epochs = st.integers(0, 5)


def deal_epoch(lengths, batch_size, accumulation, world_size, seed, epoch):
    """What trainer.py's ranks do in one epoch: a list of steps, each one (indices, trained) per rank."""
    samples_per_step = batch_size * accumulation * world_size
    steps_per_epoch = -(-len(lengths) // samples_per_step)
    steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
    dealt = list(deal_steps(lengths, samples_per_step, seed, world_size, steps))
    assert len(dealt) == len(steps) and all(len(shares) == world_size for shares in dealt)
    return dealt


def trained(step):
    """The samples of one step that count, over all ranks."""
    return [index for indices, trained in step for index in indices if trained]


@draws
@given(lengths, batch_sizes, accumulations, world_sizes, seeds, epochs)
def test_each_index_appears_exactly_once_per_epoch(lengths, batch, accumulation, world, seed, epoch):
    """Catches DistributedSampler's habits: repeating samples to fill the last step, or dropping that step.

    And a rank without anything to run, which would leave the others waiting in their all-reduce.
    """
    steps = deal_epoch(lengths, batch, accumulation, world, seed, epoch)
    assert sorted(index for step in steps for index in trained(step)) == list(range(len(lengths)))
    assert all(len(trained(step)) == batch * accumulation * world for step in steps[:-1])
    for step in steps:
        for indices, counted in step:
            assert indices and (counted or set(indices) <= set(trained(step)))


@draws
@given(lengths, batch_sizes, accumulations, world_sizes, seeds, epochs)
def test_order_depends_on_seed_and_epoch_alone(lengths, batch, accumulation, world, seed, epoch):
    """Catches an order drawn from a global generator, or from the rank, the lengths or the batch size too."""
    singly = deal_epoch([1] * len(lengths), 1, 1, 1, seed, epoch)  # one sample a step: the order itself
    order = [index for step in singly for index in trained(step)]
    np.random.seed(batch)
    torch.manual_seed(batch)
    steps = deal_epoch(lengths, batch, accumulation, world, seed, epoch)
    size = batch * accumulation * world
    for position, step in enumerate(steps):
        assert sorted(trained(step)) == sorted(order[position * size :][:size])


def test_order_differs_between_epochs_and_seeds():
    """Catches one order for every epoch, or a seed that is not used. Two of 100! orders do not coincide."""
    orders = {
        tuple(index for step in deal_epoch([1] * 100, 1, 1, 1, seed, epoch) for index in trained(step))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@draws
@given(lengths, batch_sizes, accumulations, world_sizes, seeds, epochs)
def test_loads_of_ranks_differ_by_at_most_the_longest(lengths, batch, accumulation, world, seed, epoch):
    """Catches samples dealt in turns as they are drawn, without regard to length."""
    for step in deal_epoch(lengths, batch, accumulation, world, seed, epoch):
        loads = [sum(lengths[index] for index in indices) * counted for indices, counted in step]
        assert max(loads) - min(loads) <= max(lengths[index] for index in trained(step))


def test_resuming_continues_the_same_steps():
    """Catches a sampler that starts its epoch again, or draws anew, when it begins in the middle."""
    for first in range(9):
        whole, rest = (
            list(deal_steps(range(1, 11), 4, 7, 2, steps)) for steps in (range(9), range(first, 9))
        )
        assert whole[first:] == rest
