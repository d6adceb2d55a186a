"""The two records: shapes and kinds are checked when they are made; rows and columns are cut as a whole."""

import dataclasses
import itertools

import pytest
import torch
from builders import with_mask

from lmppo.groups import MOST_TOKENS, cheapest_groups, length_groups, pack_lines
from lmppo.records import Experience, Rollout, Tokens, spread
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


def test_prompts_are_the_same_if_their_tokens_are_whatever_pads():
    ids, completion = torch.tensor([[7, 1, 2], [9, 1, 2], [0, 0, 2], [0, 1, 2], [0, 2, 1]]), torch.zeros(5, 1).long()
    tokens = Tokens(ids, mask_of("011", "011", "001", "111", "011"), completion, completion.bool())
    numbers = tokens.prompt_numbers.tolist()
    assert numbers[0] == numbers[1] and len(set(numbers)) == 4


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


def test_counted_tokens_are_picked_row_by_row_from_every_tensor():
    """Gaps left out; the prompts are gone, and what stays checks its shapes as before."""
    rollout = make_rollout(prompt=("0011", "0001"), completion=("11000", "10100"), streams=2)
    experience = Experience.from_rollout(rollout, rollout.logprobs, rollout.values)
    counted = experience.counted()
    assert counted.sizes() | {"N": 2} == {"B": 1, "P": 0, "T": 4, "K": 2, "N": 2}
    assert counted.completion_mask.all()
    places = [(0, 0), (0, 1), (1, 0), (1, 2)]
    after = tensors(counted)
    for name, tensor in tensors(experience).items():
        if "prompt" not in name:
            assert torch.equal(after[name], torch.stack([tensor[place] for place in places])[None]), name
    assert torch.equal(spread(counted.returns, rollout.completion_mask)[0, 1], rollout.values[0, 1])
    nothing = with_mask(experience, torch.zeros(2, 5).bool()).counted()
    assert nothing.sizes()["T"] == 0 and spread(nothing.returns, torch.zeros(2, 5).bool()).eq(0).all()
    with pytest.raises(TypeError, match=r"A Rollout has numbers for whole rows, with the axes \('B', 'K'\)"):
        rollout.counted()


def test_numbers_of_counted_tokens_go_back_to_their_places_and_0_elsewhere():
    mask = mask_of("0110", "1000", "0000")
    assert spread(torch.tensor([[1.0, 2.0, 3.0]]), mask).tolist() == [[0, 1, 2, 0], [3, 0, 0, 0], [0, 0, 0, 0]]
    assert spread(torch.ones(1, 3, 2), mask).shape == (3, 4, 2)


def test_micro_batches_are_all_rows_each_once_with_all_that_is_known_of_them():
    rollout = make_rollout(prompt=("0011", "0001", "1111"), completion=("1100", "1000", "1110"), streams=2)
    for size in (1, 2, 3, 100):
        found = []
        for rows, part in rollout.micro_batches(size):
            found += rows.tolist()
            for name, tensor in tensors(rollout.rows(rows)).items():
                assert torch.equal(tensors(part)[name], tensor), name
        assert sorted(found) == [0, 1, 2]


# --- groups of similar length ----------------------------------------------------------------------------------------


COST = 128


def cost_of(groups, lengths):
    return sum(len(group) * max(lengths[row] for row in group) + COST for group in groups)


def cheapest(lengths, size):
    """The least that any partition of the sorted rows costs: every set of cuts is tried."""
    ordered, budget = sorted(lengths), size * max(lengths)
    costs = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        bounds = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
        groups = [range(*pair) for pair in itertools.pairwise(bounds)]
        if all(len(group) * ordered[group[-1]] <= budget for group in groups):
            costs.append(cost_of(groups, ordered))
    return min(costs)


def random_lengths(n, longest, seed):
    return torch.randint(1, longest + 1, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("longest", [8, 200, 3000])
def test_no_other_partition_into_groups_of_similar_length_costs_less(longest, size):
    for seed in range(12):
        lengths = random_lengths(9, longest, seed)
        groups = length_groups(lengths, size, COST)
        assert cost_of(groups, lengths) == cheapest(lengths, size), lengths


@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_groups_hold_every_row_once_within_the_budget_whatever_the_order_of_the_rows(size):
    lengths = random_lengths(40, 2000, 0)
    groups = length_groups(lengths, size, COST)
    assert sorted(itertools.chain(*groups)) == list(range(40))
    assert all(len(group) * max(lengths[row] for row in group) <= size * max(lengths) for group in groups)
    ranges = [(min(lengths[row] for row in group), max(lengths[row] for row in group)) for group in groups]
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(ranges)), "the shortest first"
    for seed in range(5):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        shuffled = length_groups([lengths[row] for row in order], size, COST)
        assert [sorted(lengths[order[i]] for i in group) for group in shuffled] == [
            sorted(lengths[row] for row in group) for group in groups
        ]


def test_short_rows_are_not_padded_to_the_longest_unless_that_is_cheaper_than_another_pass():
    assert length_groups([900, 40, 1000, 50], 4, COST) == [[1, 3], [0, 2]]
    assert length_groups([90, 40, 100, 50], 4, COST) == [[0, 1, 2, 3]]


def test_one_row_is_one_group_and_equal_rows_are_groups_of_the_size():
    assert length_groups([7], 4, COST) == [[0]]
    assert length_groups([5] * 6, 100, COST) == [list(range(6))]
    for size in (1, 2, 4):
        sizes = [len(group) for group in length_groups([500] * 10, size, COST)]
        assert sum(sizes) == 10 and max(sizes) <= size and len(sizes) == -(-10 // size)


@pytest.mark.parametrize("longest", [1, 8, 200])
def test_lines_hold_every_row_once_and_no_two_of_them_would_fit_into_one(longest):
    for seed in range(12):
        lengths = random_lengths(30, longest, seed)
        lines = pack_lines(lengths, longest)
        filled = [sum(lengths[row] for row in line) for line in lines]
        assert sorted(itertools.chain(*lines)) == list(range(30)) and max(filled) <= longest
        assert len(filled) == 1 or sum(sorted(filled)[:2]) > longest
        few = sorted(itertools.chain(*lines[1::2]))
        again = pack_lines([lengths[row] for row in few], longest)
        assert [[few[i] for i in line] for line in again] == lines[1::2], "of these rows alone the lines are the same"


@pytest.mark.parametrize("size", [1, 2, 5])
def test_rows_are_packed_where_that_costs_less(size):
    seen = set()
    for seed in range(30):
        lengths = [40] * (seed % 7) + random_lengths(9, 40, seed)
        apart, _ = cheapest_groups(lengths, size, 10, packs=False)
        groups, line_length = cheapest_groups(lengths, size, 10, packs=True)
        assert apart == length_groups(lengths, size, 10)
        cost = sum(len(g) * max(lengths[i] for i in g) + 10 for g in apart)
        lines = pack_lines(lengths, max(lengths))
        packed_cost = len(lines) * max(lengths) + 10 * -(-len(lines) // size)
        assert line_length == (max(lengths) if packed_cost < cost else 0)
        assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
        if line_length:
            assert all(len(pack_lines([lengths[i] for i in group], line_length)) <= size for group in groups)
        seen.add(line_length > 0)
    assert True in seen and cheapest_groups([40] * 6, size, 10, packs=True)[1] == 0


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [
        [40] * 50, [50, 60, 70, 80, 90, 400] * 8, [20, 40, 60, 80, 100, 120, 300] * 16, [2000] * 4 + [40] * 12, [9],
        *([40, *random_lengths(60, 40, seed)] for seed in range(10)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("most", [100, 800, 2048])
def test_no_more_tokens_are_read_at_a_time_than_pays(packs, lengths, most):
    n, longest = len(lengths), max(lengths)
    groups, line_length = cheapest_groups(lengths, n, 128, packs=packs, most_tokens=most)
    assert sorted(itertools.chain(*groups)) == list(range(n))
    lines = [pack_lines([lengths[i] for i in group], line_length) if line_length else group for group in groups]
    widths = [line_length or max(lengths[i] for i in group) for group in groups]
    assert all(len(part) * width <= max(most, longest) for part, width in zip(lines, widths, strict=True))
    if line_length:
        assert max(map(len, lines)) - min(map(len, lines)) <= 1, "lines are shared out evenly"
        assert len(groups) == -(-sum(map(len, lines)) // max(1, most // longest)), "no more passes than it takes"


def test_a_cpu_reads_few_tokens_at_a_time(monkeypatch):
    record = make_rollout(prompt=["1" * 10] * 20, completion=["1" * 21] * 20)  # 30 tokens each are read
    assert [len(rows) for rows, _ in record.micro_batches(20)] == [20]
    monkeypatch.setitem(MOST_TOKENS, "cpu", 200)
    assert sorted(len(rows) for rows, _ in record.micro_batches(20)) == [2, 6, 6, 6]
