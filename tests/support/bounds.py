"""How far two results may differ because numbers are rounded: by the arithmetic, for any processor."""

import math

import torch

# Of the tiny checkpoint: each output of its FFN is a sum of 512 products, and it has two layers
TINY = {"length": 512, "layers": 2}
# Of the mean loss of its first step, where another processor chooses other codes, of a hundredth of the 664
# labels. Each changes its label's loss by 3 * sqrt(2), up or down, as logits have a standard deviation of 3
# (tiny_checkpoint.make_model): the mean changes by 0.017. The factor of ten is as below
OTHER_CODES = 10 * 3 * math.sqrt(2) * math.sqrt(0.01 * 664) / 664


def rounding_bound(length: int, layers: int = 1, scale: float = 1.0, dtype=torch.float32) -> float:
    """The largest difference between two computations of the same values that sum in another order.

    A processor's kernels add the `length` terms of a sum in an order of their own. Each addition is rounded,
    by up to eps of the dtype times the size of the values, `scale`. These errors have either sign, so that
    together they grow as the root of the length; and each of `layers` that follow one another adds its own.
    The factor of ten is for processors that no one has tried it on. With scale 1 it is a relative difference.
    """
    return 10 * torch.finfo(dtype).eps * scale * math.sqrt(length) * layers
