"""A critic that starts as a reward model values each prefix at the reward that prefix would get."""

import pytest
import torch
from builders import read
from transformers import AutoModelForTokenClassification, GPT2ForSequenceClassification

from lmppo.models import ActorCritic, load_critic
from tests.fakes import tiny_gpt2


@pytest.mark.parametrize("n_labels", [1, 2])
def test_values_are_the_rewards_of_the_prefixes_and_survive_saving(tmp_path, n_labels, capsys):
    torch.manual_seed(0)
    config = tiny_gpt2().config
    config.num_labels = n_labels
    config.problem_type = "single_label_classification" if n_labels == 2 else None
    scorer = GPT2ForSequenceClassification(config).eval()
    torch.nn.init.normal_(scorer.score.weight)
    scorer.save_pretrained(tmp_path / "scorer")
    policy = tiny_gpt2(seed=1)
    capsys.readouterr()
    critic = load_critic(str(tmp_path / "scorer"), policy)
    assert "MISSING" not in capsys.readouterr().err, "no alarm about a head that is set right here"

    ids = torch.randint(1, 257, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        _, values = read(ActorCritic(policy, critic), ids[:, :4], mask[:, :4], ids[:, 4:], mask[:, 4:])
        for t in range(5):
            logits = scorer(input_ids=ids[:, : 4 + t]).logits
            reward = logits[:, -1] - logits[:, 0] if n_labels == 2 else logits[:, 0]
            torch.testing.assert_close(values[:, t, 0], reward, atol=1e-5, rtol=1e-5)
    critic.save_pretrained(tmp_path / "critic")
    again = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(input_ids=ids).logits, critic(input_ids=ids).logits)
