"""TRPO: one natural-gradient step within a ball of KL around the policy that sampled the batch.

``maximize mean ratio_t * A_t  subject to  mean KL(old || new) <= trpo_max_kl``, means over all counted tokens

To second order the KL is ``0.5 * s^T F s`` in the step ``s``, with ``F`` the Fisher matrix, so the best direction solves
``F x = g`` for the gradient ``g`` of the surrogate, and the longest step within the ball is
``sqrt(2 * trpo_max_kl / x^T F x) * x``. F is never built: conjugate gradients need only its products with vectors.
Each costs about three times a forward and backward pass of PPO, which is why PPO clips instead.

Background: docs/notes.md, "TRPO".
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmppo.checks import NonFiniteError, check_first_ratio
from lmppo.functional import exact_kl, importance_sampled_loss, token_logprobs_and_entropy
from lmppo.loss import ratio_sums
from lmppo.models import LanguageModel, States, Sums, chunks_of, join_sums, sum_over_logits
from lmppo.protocols import CausalLM
from lmppo.records import Experience, Tokens
from lmppo.settings import TRPOUpdateSettings

BACKTRACK = 0.8
"""Each try of the line search is this much shorter than the one before."""

Measures = dict[str, float]
_MEANS = ("policy_loss", "trpo/kl", "approx_kl", "entropy", "ratio")


def trpo_update(
    model: nn.Module,
    experience: Experience,
    config: TRPOUpdateSettings,
    accelerator: Accelerator,
    *,
    iteration: int,
    first_ratio_tolerance: float | None = None,
) -> dict[str, float]:
    """Move the policy once, as far as the KL ball allows; the critic stays as it is.

    ``s = sqrt(2 * trpo_max_kl / x^T F x) * x`` with ``(F + trpo_damping * I) x = g``; the first of ``s, 0.8 s,
    0.64 s, ...`` is taken that raises the surrogate and keeps the exact mean KL(old || new) within ``trpo_max_kl``.
    If none does, no parameter changes.

    The damping only steadies the solution; the length is that of the undamped F, so that the step fills the ball
    (Schulman's code measures it with the damped F, and falls short where the curvature is small).

    Schulman et al. 2015 (arXiv 1502.05477), eq. 14 (the problem; here a state's KL is averaged over the tokens that
    count), section 6 and appendix C (conjugate gradients, line search); Kakade 2001 (the natural gradient).

    Args:
        model: Policy and critic, plain or wrapped for data parallelism.
        experience: The whole batch, the same on every process; each works on its share of the rows.
        config: Gives the ``trpo_*`` settings, the temperature and the size of a forward pass.
        accelerator: Reduces over processes.
        iteration: The PPO iteration, for messages.
        first_ratio_tolerance: If given, the largest |log ratio| allowed before the step, where it must be 0.

    Returns:
        ``policy_loss, approx_kl, entropy, ratio``: after the step, means over counted tokens. ``first_ratio_error``: the
        largest |log ratio| *before* it, which rounding alone explains. ``trpo/grad_norm`` of the surrogate;
        ``trpo/kl``: exact; ``trpo/expected_improvement`` of the surrogate by the whole of s, to first order;
        ``trpo/improvement``: what the step taken brought; ``trpo/step_fraction`` of s that was taken, 0 if none;
        ``trpo/cg_residual``: ``|g - (F + trpo_damping * I) x| / |g|``.

    Raises:
        StepZeroError: The log-probabilities are not those of the rollout; nothing changed.
        NonFiniteError: The gradient or the curvature is not finite, or the curvature not positive; nothing changed.
        ValueError: The policy is sharded, or its attention cannot be differentiated twice.
    """
    batch = PolicyBatch(accelerator.unwrap_model(model).language_model, experience, config, accelerator)
    start = after = batch.measure({})
    if first_ratio_tolerance is not None:
        check_first_ratio(start, first_ratio_tolerance)
    gradient = batch.surrogate_gradient()
    if not gradient.isfinite().all():
        culprit = next(name for name, p in batch.moved_by(gradient).items() if not p.isfinite().all())
        raise NonFiniteError(
            f"Iteration {iteration}: the surrogate's gradient is not finite (first parameter: {culprit}). The step was "
            f"not taken. Look at the rewards of this batch."
        )
    expected = fraction = residual = 0.0
    if gradient.any():
        step, residual = _natural_step(batch, gradient, config, iteration)
        expected = torch.dot(gradient, step).item()
        after, fraction = _line_search(batch, step, start, config)
    return {name: value for name, value in after.items() if name != "log_ratio_max"} | {
        "first_ratio_error": start["log_ratio_max"],
        "trpo/grad_norm": gradient.norm().item(),
        "trpo/expected_improvement": expected,
        "trpo/improvement": start["policy_loss"] - after["policy_loss"],
        "trpo/step_fraction": fraction,
        "trpo/cg_residual": residual,
    }


def _natural_step(
    batch: "PolicyBatch", gradient: Tensor, config: TRPOUpdateSettings, iteration: int
) -> tuple[Tensor, float]:
    """The longest natural-gradient step within the ball, by the curvature; and the residual of its direction."""
    damping, fisher = config.trpo_damping, batch.fisher_vector_product
    direction = conjugate_gradients(lambda v: fisher(v) + damping * v, gradient, steps=config.trpo_cg_steps)
    curved = fisher(direction)
    curvature = torch.dot(direction, curved)
    if not (curvature.isfinite() and curvature > 0):
        raise NonFiniteError(
            f"Iteration {iteration}: the KL's curvature along TRPO's direction is {curvature.item():.2e}, and must be "
            f"positive and finite. The step was not taken. Raise trpo_damping={damping}."
        )
    residual = (gradient - curved - damping * direction).norm() / gradient.norm()
    return (2 * config.trpo_max_kl / curvature).sqrt() * direction, residual.item()


@torch.no_grad()
def _line_search(
    batch: "PolicyBatch", step: Tensor, start: Measures, config: TRPOUpdateSettings
) -> tuple[Measures, float]:
    """Take the longest step that passes: its measures and its fraction of the whole; the start and 0 if none does.

    The parameters are written only then, so that a refused step leaves nothing behind.
    """
    for i in range(config.trpo_line_search_steps):
        candidate = batch.moved_by(BACKTRACK**i * step)
        after = batch.measure(candidate)
        if after["policy_loss"] < start["policy_loss"] and after["trpo/kl"] <= config.trpo_max_kl:
            for name, parameter in batch.parameters.items():
                parameter.copy_(candidate[name])
            return after, BACKTRACK**i
    return start, 0.0


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], target: Tensor, *, steps: int, tolerance: float = 1e-10
) -> Tensor:
    """The solution of ``A x = target`` from products with A alone, exact after as many steps as A has eigenvalues.

    Hestenes and Stiefel 1952; Schulman et al. 2015 (arXiv 1502.05477), appendix C.

    Args:
        product: ``v -> A v`` for a symmetric, positive definite A.
        target: ``(N,)``.
        steps: Most products to take.
        tolerance: Stop when the residual is this small against the target.

    Returns:
        ``(N,)``; what was reached where the curvature of a direction turns out not to be positive (rounding).
    """
    x, residual, direction = torch.zeros_like(target), target, target
    squared = torch.dot(residual, residual)
    enough = tolerance**2 * squared
    for _ in range(steps):
        curved = product(direction)
        curvature = torch.dot(direction, curved)
        if not curvature > 0:
            break
        length = squared / curvature
        x = x + length * direction
        residual = residual - length * curved
        before, squared = squared, torch.dot(residual, residual)
        if squared <= enough:
            break
        direction = residual + squared / before * direction
    return x


class PolicyBatch:
    """A batch as functions of the policy's trainable parameters: all means are over its counted tokens.

    Every process computes its share of the rows, and all get the same means. The old policy's hidden states are computed
    once; logits exist in chunks of tokens, but for the Fisher product, which needs those of a micro-batch twice
    differentiable.

    Args:
        language_model: The policy; its present parameters are the old ones.
        experience: The whole batch.
        config: Gives temperature and micro-batch size.
        accelerator: Reduces over processes.

    Raises:
        ValueError: The policy is sharded, or its attention cannot be differentiated twice.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        experience: Experience,
        config: TRPOUpdateSettings,
        accelerator: Accelerator,
    ) -> None:
        self.policy = _Policy(language_model, accelerator)
        self.parameters = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        _check_differentiable(language_model.model, self.parameters)
        own_rows = experience.rows(slice(accelerator.process_index, None, accelerator.num_processes))
        self.micros = [
            micro for _, micro in own_rows.micro_batches(config.micro_batch_size, packs=language_model.packs)
        ]
        self.vocab_size = language_model.vocab_size
        self.n_tokens = max(1, int(experience.completion_mask.sum()))
        self.config, self.accelerator = config, accelerator
        with torch.no_grad():
            self.old = [self.policy(micro.tokens) for micro in self.micros]

    def surrogate_gradient(self) -> Tensor:
        """``(N,)`` gradient of mean ratio * advantage, N the number of trainable parameters."""

        def of_one(micro: Experience) -> Tensor:
            counted = micro.counted()

            def surrogate(logits: Tensor, part: slice) -> tuple[Tensor, Sums]:
                return -self._losses(counted.cut(T=part), logits)["policy_loss"], {}

            states = self.policy(micro.tokens)
            return self._gradient(sum_over_logits(states, self.policy, surrogate, vocab_size=self.vocab_size)[0])

        return self._mean(of_one)

    def fisher_vector_product(self, v: Tensor) -> Tensor:
        """``(N,)`` product of the Fisher matrix with ``v (N,)``: the Hessian of the mean KL(old || new) at new = old.

        ``F v = grad (grad KL . v)``. Schulman et al. 2015 (arXiv 1502.05477), appendix C.1.
        """

        def one_product(micro: Experience) -> Tensor:
            logits = self.policy(self.policy(micro.tokens))
            kl = self._kl(micro.counted(), logits.detach(), logits)
            return self._gradient(torch.dot(self._gradient(kl, create_graph=True), v))

        return self._mean(one_product)

    @torch.no_grad()
    def measure(self, parameters: dict[str, Tensor]) -> Measures:
        """A policy against the old one: with some of its parameters replaced."""
        seen = []
        for micro, old in zip(self.micros, self.old, strict=True):
            new, counted = functional_call(self.policy, parameters, (micro.tokens,)), micro.counted()
            for part in chunks_of(new, self.vocab_size):
                some, logits = counted.cut(T=part), functional_call(self.policy, parameters, (new.cut(part),))
                seen.append(
                    self._losses(some, logits) | {"trpo/kl": self._kl(some, self.policy(old.cut(part)), logits)}
                )
        sums = join_sums(seen)
        means = self.accelerator.reduce(torch.stack([sums[n] for n in _MEANS]), reduction="sum") / self.n_tokens
        largest = self.accelerator.gather(sums["log_ratio_max"].reshape(1)).max()
        return dict(zip(_MEANS, means.tolist(), strict=True)) | {"log_ratio_max": largest.item()}

    def moved_by(self, step: Tensor) -> dict[str, Tensor]:
        """The trainable parameters plus a step ``(N,)``, by name."""
        parts = step.split([p.numel() for p in self.parameters.values()])
        return {n: p.detach() + s.view_as(p) for (n, p), s in zip(self.parameters.items(), parts, strict=True)}

    def _mean(self, per_micro: Callable[[Experience], Tensor]) -> Tensor:
        total = functools.reduce(torch.add, map(per_micro, self.micros))
        return self.accelerator.reduce(total, reduction="sum") / self.n_tokens

    def _gradient(self, scalar: Tensor, *, create_graph: bool = False) -> Tensor:
        inputs = list(self.parameters.values())
        parts = torch.autograd.grad(scalar, inputs, create_graph=create_graph, materialize_grads=True)
        return torch.cat([part.reshape(-1) for part in parts])

    def _kl(self, micro: Experience, old: Tensor, new: Tensor) -> Tensor:
        kl = exact_kl(old, new, temperature=self.config.temperature, support=micro.support.allowed())
        return torch.where(micro.completion_mask, kl, 0.0).sum()

    def _losses(self, micro: Experience, logits: Tensor) -> dict[str, Tensor]:
        """Sums over counted tokens; of the log-ratios the largest."""
        logprobs, entropy = token_logprobs_and_entropy(
            logits,
            micro.tokens.completion_ids,
            temperature=self.config.temperature,
            support=micro.support.allowed(),
        )
        mask = micro.completion_mask
        loss = importance_sampled_loss(logprobs, micro.old_logprobs, micro.advantages, mask)
        sums = {"policy_loss": loss.sum(), "entropy": torch.where(mask, entropy, 0.0).sum()}
        return sums | ratio_sums(logprobs, micro)


class _Policy(nn.Module):
    """The policy's two steps, tokens to states and states to logits, by operations that can be differentiated twice.

    The fused kernels of scaled_dot_product_attention cannot; its plain one can, and computes what eager attention does.
    """

    def __init__(self, language_model: LanguageModel, accelerator: Accelerator) -> None:
        super().__init__()
        self.policy = language_model.model
        self.language_model = language_model
        self.autocast = accelerator.autocast

    def forward(self, given: Tokens | States) -> Any:
        if isinstance(given, States):
            return self.language_model.logits_of(given)
        with sdpa_kernel(SDPBackend.MATH), self.autocast():
            return self.language_model.read(given)


def _check_differentiable(policy: CausalLM, parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.numel() == 0 or hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"objective='trpo' needs whole parameters, and {name} is sharded over processes: use plain data "
                f"parallelism, or another objective."
            )
    attention = getattr(policy.config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise ValueError(
            f"objective='trpo' differentiates twice, which {attention!r} attention cannot: load the model with "
            f"attn_implementation='sdpa' or 'eager'."
        )
