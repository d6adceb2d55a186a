"""The two records: shapes and kinds are checked when they are made; rows and columns are cut as a whole."""

import dataclasses

import pytest
import torch

from lmppo.records import Experience, Rollout, Tokens
from lmppo.support import Support, pack


def mask_of(*rows):
    return torch.tensor([[c == "1" for c in row] for row in rows])


def make_rollout(prompt=("011", "111"), completion=("1100", "1000"), *, streams=1, vocabulary=9):
    prompt_mask, mask = mask_of(*prompt), mask_of(*completion)
    n_rows, n_time = mask.shape
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator)

    return Rollout(
        tokens=Tokens(
            prompt_ids=torch.arange(prompt_mask.numel()).reshape(prompt_mask.shape),
            prompt_mask=prompt_mask,
            completion_ids=torch.arange(mask.numel()).reshape(mask.shape),
            completion_mask=mask,
        ),
        support=Support(pack(torch.rand(n_rows, n_time, vocabulary, generator=generator) < 0.5), "bits", vocabulary),
        logprobs=numbers(n_rows, n_time),
        ref_logprobs=numbers(n_rows, n_time),
        ref_support_logprobs=numbers(n_rows, n_time),
        values=numbers(n_rows, n_time, streams),
        scores=numbers(n_rows, n_time, streams),
        kl_penalty=numbers(n_rows, n_time),
        bootstrap_values=numbers(n_rows, streams),
        ended=torch.ones(n_rows, dtype=torch.bool),
        max_logit=torch.zeros(n_rows),
    )


def test_kl_to_ref_is_the_log_ratio_of_counted_tokens():
    rollout = make_rollout()
    rollout = dataclasses.replace(rollout, logprobs=rollout.logprobs.masked_fill(~rollout.completion_mask, torch.nan))
    expected = [[(rollout.logprobs - rollout.ref_logprobs)[0, 0], (rollout.logprobs - rollout.ref_logprobs)[0, 1], 0, 0],
                [(rollout.logprobs - rollout.ref_logprobs)[1, 0], 0, 0, 0]]  # fmt: skip
    assert torch.equal(rollout.kl_to_ref, torch.tensor(expected))
    assert rollout.tokens.lengths.tolist() == [2, 1]


def tensors(record, path=""):
    """Every tensor of a record by its full name, those of the records within it too."""
    found = {}
    for f in dataclasses.fields(record):
        value, name = getattr(record, f.name), f"{path}{f.name}"
        if dataclasses.is_dataclass(value):
            found |= tensors(value, f"{name}.")
        elif isinstance(value, torch.Tensor):
            found[name] = value
    return found


def with_tensor(record, name, tensor):
    """The record with one tensor replaced, by its full name."""
    first, _, rest = name.partition(".")
    value = with_tensor(getattr(record, first), rest, tensor) if rest else tensor
    return dataclasses.replace(record, **{first: value})


NAMES = list(tensors(make_rollout()))


def test_every_tensor_is_declared():
    declared = []
    make_rollout().map(lambda tensor, axes: declared.append(axes) or tensor)
    assert len(declared) == len(NAMES) == 14
    assert all(axes[0] == "B" for axes in declared)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_shape_names_the_record(name):
    rollout = make_rollout()
    tensor = tensors(rollout)[name]
    with pytest.raises(ValueError, match=r"has shape .*; expected \("):
        with_tensor(rollout, name, tensor[:1])
    with pytest.raises(ValueError, match=r"has shape .*; expected \("):
        with_tensor(rollout, name, tensor.unsqueeze(-1))


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_kind_names_the_field(name):
    rollout = make_rollout()
    tensor = tensors(rollout)[name]
    wrong = tensor.long() if tensor.is_floating_point() else tensor.float()
    with pytest.raises(TypeError, match=rf"\.{name.split('.')[-1]} is torch\.\w+; expected"):
        with_tensor(rollout, name, wrong)


def test_masks_of_integers_are_refused():
    """~mask of an integer mask is silently wrong."""
    tokens = make_rollout().tokens
    with pytest.raises(TypeError, match=r"completion_mask is torch.int64; expected torch.bool"):
        dataclasses.replace(tokens, completion_mask=tokens.completion_mask.long())


def test_streams_must_agree():
    rollout = make_rollout(streams=2)
    with pytest.raises(ValueError, match=r"Rollout\.scores has shape \(2, 4, 1\); expected \(B = 2, T = 4, K = 2\)"):
        dataclasses.replace(rollout, scores=rollout.scores[..., :1])


def test_an_experience_keeps_what_the_update_may_see():
    rollout = make_rollout()
    advantages, returns = torch.zeros(2, 4), torch.ones(2, 4, 1)
    experience = Experience.from_rollout(rollout, advantages, returns)
    assert experience.old_logprobs is rollout.logprobs and experience.old_values is rollout.values
    assert experience.advantages is advantages and experience.returns is returns
    with pytest.raises(ValueError, match=r"Experience\.returns has shape \(2, 4\); expected \(B = 2, T = 4, K = 1\)"):
        Experience.from_rollout(rollout, advantages, returns[..., 0])


def test_records_cannot_be_written_to():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_rollout().scores = None


@pytest.mark.parametrize("rows", [torch.tensor([1, 0, 1]), torch.tensor([False, True]), slice(0, None, 2)])
def test_rows_are_selected_in_every_tensor(rows):
    rollout = make_rollout()
    selected = tensors(rollout.rows(rows))
    assert len(rollout.rows(rows)) == len(torch.arange(2)[rows])
    for name, tensor in tensors(rollout).items():
        assert torch.equal(selected[name], tensor[rows]), name


def test_trimming_drops_what_no_row_uses_and_nothing_else():
    rollout = make_rollout(prompt=("0011", "0001"), completion=("11000", "10100"), streams=2)
    trimmed = rollout.trim()
    assert trimmed.tokens.prompt_mask.equal(mask_of("11", "01"))
    assert trimmed.completion_mask.equal(mask_of("110", "101")), "a gap stays"
    after = tensors(trimmed)
    for name, tensor in tensors(rollout).items():
        columns = (
            slice(None)
            if tensor.ndim == 1 or name == "bootstrap_values"
            else slice(2, None)
            if "prompt" in name
            else slice(0, 3)
        )
        expected = tensor if tensor.ndim == 1 else tensor[:, columns]
        assert torch.equal(after[name], expected), name


def test_micro_batches_are_the_rows_without_unused_columns():
    rollout = make_rollout(prompt=("0011", "0001", "1111"), completion=("1100", "1000", "1110"))
    parts = list(rollout.micro_batches(2))
    assert [rows for rows, _ in parts] == [slice(0, 2), slice(2, 4)]
    assert [part.sizes()["T"] for _, part in parts] == [2, 3] and [part.sizes()["P"] for _, part in parts] == [2, 4]
    doubled = rollout.per_token(lambda part: 2 * part.logprobs, micro_batch_size=2)
    assert torch.equal(doubled, torch.where(rollout.completion_mask, 2 * rollout.logprobs, 0.0))


def test_trimming_a_batch_in_which_nothing_counts_leaves_one_column():
    assert make_rollout(completion=("0000", "0000")).trim().completion_mask.shape == (2, 1)
