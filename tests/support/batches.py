"""Micro-batches of a StepDataset as tensors on the CPU, where a test calls a model itself."""

import torch

import dataset

CPU = torch.device("cpu")


def micro_batches(data, indices):
    """[(batch of tensors, counts (1 + num_codebooks + 2,)), ...] of the samples that `indices` name."""
    return [(dataset.to_tensors(batch, CPU), torch.from_numpy(counts)) for batch, counts in data[indices]]
