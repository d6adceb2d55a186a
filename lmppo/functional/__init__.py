"""The math of PPO for language models: pure functions on tensors, on top of torch alone.

Conventions, the same everywhere:

- Tensors are ``(B, T)``, sequences by completion positions, unless a docstring says otherwise. Shapes are checked and
  never broadcast; ``mask`` is the completion mask, bool, True = the token counts, gaps allowed.
- Where the mask is False, results are 0, and inputs never matter: NaN there changes no output and no gradient.
- float64 is computed in float64; float16 and bfloat16 are computed, and returned, in float32.
- Scalars are keyword-only. No function changes its arguments, draws random numbers or talks to other processes.

What can be known exactly about a small problem is in :mod:`lmppo.functional.exact`, which has names of its own.
"""

from lmppo.functional.advantages import (
    explained_variance,
    explained_variance_within_prompts,
    gae,
    immediate_rewards,
    length_adaptive_lam,
    rewards_to_go,
    td_residuals,
    total_return,
)
from lmppo.functional.baselines import (
    batch_mean_baseline,
    leave_one_out_baseline,
)
from lmppo.functional.kl import (
    exact_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_shaped_rewards,
)
from lmppo.functional.logprobs import (
    support_logprobs,
    token_entropy,
    token_logprobs,
    token_logprobs_and_entropy,
)
from lmppo.functional.losses import (
    approx_kl,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    importance_sampled_loss,
    kl_penalized_policy_loss,
    policy_gradient_loss,
    token_mean_loss,
)
from lmppo.functional.masked import (
    masked_mean,
    masked_rescale,
    masked_var,
    masked_whiten,
)

__all__ = [
    "approx_kl",
    "batch_mean_baseline",
    "clip_fraction",
    "clipped_policy_loss",
    "clipped_value_loss",
    "exact_kl",
    "explained_variance",
    "explained_variance_within_prompts",
    "gae",
    "immediate_rewards",
    "importance_sampled_loss",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_penalized_policy_loss",
    "kl_shaped_rewards",
    "leave_one_out_baseline",
    "length_adaptive_lam",
    "masked_mean",
    "masked_rescale",
    "masked_var",
    "masked_whiten",
    "policy_gradient_loss",
    "rewards_to_go",
    "support_logprobs",
    "td_residuals",
    "token_entropy",
    "token_logprobs",
    "token_logprobs_and_entropy",
    "token_mean_loss",
    "total_return",
]
