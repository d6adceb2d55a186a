"""Devices without float64, as Apple's GPUs are: a stand-in that raises as they do draws the tokens of the CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lmppo.sampling import SamplingParams, draw, has_float64, sample, uniform_noise

DEVICE = torch.device("meta")  # any that is not the CPU; within the mode below its tensors hold numbers


class OnDevice(torch.Tensor):
    """A tensor of the stand-in; ``held`` has its numbers."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=DEVICE)

    def __init__(self, held):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Device().__torch_dispatch__(func, types, args, kwargs)


class Device(TorchDispatchMode):
    """Computes on the CPU what is asked of the stand-in, and raises where float64 would come out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_device = any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
        if kwargs.get("device") is not None:
            on_device, kwargs["device"] = torch.device(kwargs["device"]).type == DEVICE.type, "cpu"
        out = func(*tree_map(held, args), **tree_map(held, kwargs))
        return tree_map(placed, out) if on_device else out


def held(value):
    return value.held if isinstance(value, OnDevice) else value


def placed(value):
    if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
    return OnDevice(value) if isinstance(value, torch.Tensor) else value


@pytest.fixture
def device():
    has_float64.cache_clear()
    with Device():
        yield
    has_float64.cache_clear()


def test_the_stand_in_has_no_float64_and_the_cpu_has(device):
    with pytest.raises(TypeError, match="doesn't support float64"):
        OnDevice(torch.ones(2)).double()
    with pytest.raises(TypeError, match="doesn't support float64"):
        torch.ones(2, dtype=torch.float64).to(DEVICE)
    assert not has_float64(DEVICE) and has_float64(torch.device("cpu"))


@pytest.mark.parametrize("restricted", [False, True])
def test_a_draw_is_that_of_the_cpu(device, restricted):
    logits, uniforms = 3 * torch.randn(200, 50), torch.rand(200, dtype=torch.float64)
    logprobs = SamplingParams(1, temperature=0.7).distribution(logits, logits > 0 if restricted else None)
    expected = draw(logprobs, uniforms)
    drawn = draw(OnDevice(logprobs), uniforms)
    assert drawn.device == DEVICE and drawn.held.equal(expected)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}])
def test_the_sampler_draws_what_it_draws_on_the_cpu(device, settings):
    table = 2 * torch.randn(9, 6, 12, generator=torch.Generator().manual_seed(0))

    class Decoder:
        """Logits from a table, for rows that are left."""

        below = None

        def __init__(self, prompt_ids, prompt_mask, graphs_for):
            self.put = OnDevice if isinstance(prompt_ids, OnDevice) else lambda tensor: tensor
            self.rows, self.t = torch.arange(6), 0
            self.feed(None)

        def keep(self, rows):
            self.rows = self.rows[held(rows)]

        def feed(self, token):
            self.logits = self.put(table[self.t, self.rows])
            self.hidden = self.put(table[self.t, self.rows, :1])
            self.t += 1

    model = SimpleNamespace(n_streams=1, critic=None, value_head=True, values_of=lambda hidden: hidden, decoder=Decoder)
    ids, mask = torch.ones(6, 3, dtype=torch.long), torch.ones(6, 3, dtype=torch.bool)
    params, noise = SamplingParams(9, eos_token_ids=(0,), **settings), uniform_noise(0, 0, range(6), 9)
    expected = sample(model, ids, mask, noise, params)
    assert 0 < expected.ended.sum() < 6, "some rows end before others"
    samples = sample(model, OnDevice(ids), OnDevice(mask), noise, params)
    assert samples.tokens.completion_ids.held.equal(expected.tokens.completion_ids)
    assert samples.logprobs.held.equal(expected.logprobs) and samples.values.held.equal(expected.values)
