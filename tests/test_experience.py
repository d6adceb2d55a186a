"""The two records: shapes and kinds are checked when they are made; rows and columns are cut as a whole."""

import dataclasses
import re

import pytest
import torch

from lmppo.experience import Experience, Rollout, concatenate, move, select_rows, trim


def mask_of(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


def make_rollout(prompt=("011", "111"), completion=("1100", "1000"), *, streams=1, vocabulary=1):
    prompt_mask, mask = mask_of(*prompt), mask_of(*completion)
    n_rows, n_time = mask.shape
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    return Rollout(
        prompt_ids=torch.arange(prompt_mask.numel()).reshape(prompt_mask.shape),
        prompt_mask=prompt_mask,
        completion_ids=torch.arange(mask.numel()).reshape(mask.shape),
        completion_mask=mask,
        logprobs=numbers(n_rows, n_time),
        ref_logprobs=numbers(n_rows, n_time),
        values=numbers(n_rows, n_time, streams),
        scores=numbers(n_rows, n_time, streams),
        kl_penalty=numbers(n_rows, n_time),
        bootstrap_values=numbers(n_rows, streams),
        ended=torch.ones(n_rows, dtype=torch.bool),
        max_logit=torch.zeros(n_rows),
        support=torch.ones(n_rows, n_time, vocabulary, dtype=torch.bool),
    )


def test_kl_to_ref_is_the_log_ratio_of_counted_tokens():
    rollout = make_rollout()
    rollout = dataclasses.replace(rollout, logprobs=rollout.logprobs.masked_fill(~rollout.completion_mask, torch.nan))
    expected = [[(rollout.logprobs - rollout.ref_logprobs)[0, 0], (rollout.logprobs - rollout.ref_logprobs)[0, 1], 0, 0],
                [(rollout.logprobs - rollout.ref_logprobs)[1, 0], 0, 0, 0]]  # fmt: skip
    assert torch.equal(rollout.kl_to_ref, torch.tensor(expected))
    assert rollout.completion_lengths.tolist() == [2, 1]


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Rollout)])
def test_a_wrong_shape_names_the_field(name):
    rollout = make_rollout()
    tensor = getattr(rollout, name)
    missing_row = tensor[:1]
    with pytest.raises(ValueError, match=rf"Rollout\.?.*(has shape|must be).*{re.escape(str(2))}"):
        dataclasses.replace(rollout, **{name: missing_row})
    with pytest.raises(ValueError, match="Rollout"):
        dataclasses.replace(rollout, **{name: tensor.unsqueeze(-1)})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Rollout)])
def test_a_wrong_kind_names_the_field(name):
    rollout = make_rollout()
    tensor = getattr(rollout, name)
    wrong = tensor.long() if tensor.is_floating_point() else tensor.float()
    with pytest.raises(TypeError, match=rf"Rollout\.{name} is torch\.\w+; expected"):
        dataclasses.replace(rollout, **{name: wrong})


def test_masks_of_integers_are_refused():
    """~mask of an integer mask is silently wrong."""
    rollout = make_rollout()
    with pytest.raises(TypeError, match=r"completion_mask is torch.int64; expected torch.bool"):
        dataclasses.replace(rollout, completion_mask=rollout.completion_mask.long())


def test_streams_must_agree():
    rollout = make_rollout(streams=2)
    with pytest.raises(ValueError, match=r"Rollout\.scores has shape \(2, 4, 1\); expected \(2, 4, 2\)"):
        dataclasses.replace(rollout, scores=rollout.scores[..., :1])


def test_an_experience_keeps_what_the_update_may_see():
    rollout = make_rollout()
    advantages, returns = torch.zeros(2, 4), torch.ones(2, 4, 1)
    experience = Experience.from_rollout(rollout, advantages, returns)
    assert experience.old_logprobs is rollout.logprobs and experience.old_values is rollout.values
    assert experience.advantages is advantages and experience.returns is returns
    with pytest.raises(ValueError, match=r"Experience\.returns has shape \(2, 4\); expected \(2, 4, 1\)"):
        Experience.from_rollout(rollout, advantages, returns[..., 0])


def test_records_cannot_be_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_rollout().scores = None


@pytest.mark.parametrize("rows", [torch.tensor([1, 0, 1]), torch.tensor([False, True]), slice(0, None, 2)])
def test_rows_are_selected_in_every_field(rows):
    rollout = make_rollout()
    selected = select_rows(rollout, rows)
    for f in dataclasses.fields(Rollout):
        assert torch.equal(getattr(selected, f.name), getattr(rollout, f.name)[rows]), f.name


def test_concatenating_the_parts_gives_the_whole():
    rollout = make_rollout()
    parts = [select_rows(rollout, slice(i, i + 1)) for i in range(2)]
    whole = concatenate(parts)
    assert all(torch.equal(getattr(whole, f.name), getattr(rollout, f.name)) for f in dataclasses.fields(Rollout))
    assert all(getattr(move(rollout, "meta"), f.name).is_meta for f in dataclasses.fields(Rollout))


def test_trimming_drops_what_no_row_uses_and_nothing_else():
    rollout = make_rollout(prompt=("0011", "0001"), completion=("11000", "10100"), vocabulary=3)
    trimmed = trim(rollout)
    assert trimmed.prompt_mask.equal(mask_of("11", "01"))
    assert trimmed.completion_mask.equal(mask_of("110", "101")), "a gap stays"
    assert trimmed.prompt_ids.equal(rollout.prompt_ids[:, 2:])
    for name in ("completion_ids", "logprobs", "values", "scores", "support"):
        assert torch.equal(getattr(trimmed, name), getattr(rollout, name)[:, :3]), name
    assert trimmed.ended.equal(rollout.ended)


def test_trimming_a_batch_in_which_nothing_counts_leaves_one_column():
    assert trim(make_rollout(completion=("0000", "0000"))).completion_mask.shape == (2, 1)
