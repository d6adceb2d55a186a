"""Bias and variance of gradient estimates: drawn, batch by batch, and held against the exact gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from grid import Problem
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """Bias and variance of a batch's mean, over the true gradient's squared length; with standard errors."""

    bias2: float
    bias2_error: float
    variance: float
    variance_error: float


def measure(problem: Problem, weights_of: Callable[[Tensor], Tensor], *, batches: int, size: int) -> Measured:
    """Bias and variance of an estimator from independent batches.

    ``|mean - truth|^2`` is too large by the variance of the mean, so the average is over pairs of *different* batches.
    """
    rows = problem.draw(batches, size, seed=size)
    truth = problem.true_gradient()
    unit = truth.square().sum()
    estimates = problem.gradients(weights_of(rows), rows)
    spread = estimates - estimates.mean(dim=0)
    covariance = spread.T @ spread / (batches - 1)
    off = estimates.mean(dim=0) - truth
    bias2 = off.square().sum() - covariance.trace() / batches
    bias2_variance = 4 * off @ covariance @ off / batches + 2 * covariance.square().sum() / batches**2
    distances = spread.square().sum(dim=1) / unit
    return Measured(
        bias2=(bias2 / unit).item(),
        bias2_error=(bias2_variance.sqrt() / unit).item(),
        variance=(covariance.trace() / unit).item(),
        variance_error=(distances.std() / batches**0.5).item(),
    )


def exactly(problem: Problem, weights: Tensor) -> Measured:
    """The same of one completion, whose weights (N, T) depend on nothing else, by listing all: no error."""
    truth = problem.true_gradient()
    each = problem.gradients(weights.unsqueeze(1), torch.arange(len(weights)).unsqueeze(1))
    mean = problem.chances @ each
    variance = problem.chances @ (each - mean).square().sum(dim=1)
    unit = truth.square().sum()
    return Measured(((mean - truth).square().sum() / unit).item(), 0.0, (variance / unit).item(), 0.0)
