"""Micro-batches of a StepDataset as tensors on the CPU, where a test calls a model itself."""

import torch

import dataset

CPU = torch.device("cpu")


def plan_of(data, indices, max_tokens=4096):
    """The micro-batches of the samples that `indices` name, as a rank cuts them."""
    lengths = {index: data.load_sample(index)[0] for index in indices}
    longest_first = sorted(indices, key=lengths.get, reverse=True)
    return dataset.split_into_micro_batches(longest_first, lengths, max_tokens)


def micro_batches(data, indices, max_tokens=4096):
    """[(batch of tensors, counts (1 + num_codebooks + 2,)), ...] of the samples that `indices` name."""
    plan = plan_of(data, indices, max_tokens)
    return [(dataset.to_tensors(batch, CPU), torch.from_numpy(counts)) for batch, counts in data[plan]]
