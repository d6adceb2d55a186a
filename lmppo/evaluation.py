"""Evaluation: held-out prompts, one set or several by name, sampled with the same noise every time."""

from collections.abc import Callable, Mapping
from typing import Any

from lmppo.collector import Collector, ScoredRollout
from lmppo.metrics import rollout_metrics
from lmppo.prompts import PromptBatch, PromptEncoder, PromptStream
from lmppo.sampling import EVALUATION


class Evaluation:
    """The evaluation sets of a run.

    Args:
        dataset: Rows with a ``prompt``, or several such sets by name; None: no set.
        encoder: Prompts to tokens.
        needed: Columns that something cannot do without, and what that is, for messages.

    Raises:
        ValueError: A set is empty or has not the columns that are needed, a prompt is not usable, or the sets' names are not.
    """

    def __init__(self, dataset: Any, encoder: PromptEncoder, needed: Mapping[str, str] | None = None) -> None:
        self.is_named = isinstance(dataset, dict)
        named = dataset if self.is_named else {} if dataset is None else {"": dataset}
        if self.is_named and not (named and all(isinstance(name, str) and name for name in named)):
            raise ValueError(
                f"eval_dataset has the keys {list(named)}; expected names of data sets, each with its rows."
            )
        if "prompt" in named:
            raise ValueError(
                "eval_dataset has the key 'prompt', so it looks like columns: give datasets.Dataset.from_dict(...) "
                "instead. (A dict is taken as several data sets by name.)"
            )
        self.streams = {
            name: PromptStream(
                rows,
                encoder,
                shuffle=False,
                name=f"eval_dataset[{name!r}]" if name else "eval_dataset",
                needed=needed,
            )
            for name, rows in named.items()
        }
        self._batches: dict[str, PromptBatch] = {}  # the first prompts of each set, read once

    def sample(self, collector: Collector, n_completions: int) -> Any:
        """Scored completions of the first prompts of each set: a :class:`ScoredRollout`, or one for each name.

        Raises:
            ValueError: There is no set.
        """
        if not self.streams:
            raise ValueError("Evaluation needs an eval_dataset.")
        scored: dict[str, ScoredRollout] = {}
        for name, stream in self.streams.items():
            if len(self._batches.get(name, ())) != n_completions:
                stream.load_state_dict({"drawn": 0})
                self._batches[name] = stream.next_batch(n_completions)
            scored[name] = collector.collect(self._batches[name], 0, purpose=EVALUATION)
        return scored if self.is_named else scored[""]

    def metrics(self, scored: Any, *, kl_coef: float, tell: Callable[..., None] = lambda **_: None) -> dict[str, float]:
        """The metrics of all sets, called ``eval_{metric}``, or ``eval_{name}_{metric}`` if the sets have names.

        Args:
            scored: What :meth:`sample` gave.
            kl_coef: Coefficient of the KL penalty.
            tell: Gets each set's ``metrics``, and its prompts as ``eval_dataloader``.
        """
        metrics: dict[str, float] = {}
        for name, of_set in (scored if self.is_named else {"": scored}).items():
            prefix = f"eval_{name}_" if name else "eval_"
            own = {prefix + metric: value for metric, value in rollout_metrics(of_set, kl_coef=kl_coef).items()}
            tell(metrics=own, eval_dataloader=self.streams[name])
            metrics |= own
        return metrics
