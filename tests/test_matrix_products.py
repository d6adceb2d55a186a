"""Large products of float32 matrices by oneDNN: the numbers, gradients and errors of torch's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.backends import mkldnn
from transformers import GPT2Config, GPT2LMHeadModel

from lmppo import matrix_products
from lmppo.matrix_products import suits_onednn, use_onednn

# How much memory products of 200 shapes take, in kB; each is smaller than the one before, and finds its place there.
PROGRAM = """
import re, torch
from pathlib import Path
from lmppo.matrix_products import use_onednn
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
library = use_onednn()
left, right = torch.randn(500, 600), torch.randn(600, 900)
left @ right
before = resident()
for rows in range(499, 299, -1):
    left[:rows] @ right
print(resident() - before)
"""

ROWS, LONG, WIDE = 5, 600, 900  # LONG * WIDE numbers are enough


@pytest.fixture
def products(monkeypatch):
    """The shapes of what oneDNN has computed."""
    shapes, compute = [], matrix_products._product

    def product(left, right, bias=None):
        shapes.append((*left.shape, right.shape[1], bias is not None))
        return compute(left, right, bias)

    monkeypatch.setattr(matrix_products, "_product", product)
    use_onednn.cache_clear()
    library = use_onednn()
    yield shapes
    library._destroy()
    use_onednn.cache_clear()  # the next trainer that it suits will ask for it again


def plain(function, *tensors):
    with mkldnn.flags(enabled=False, allow_tf32=None):
        return function(*tensors)


def matrices(rows=ROWS, deep=LONG, wide=WIDE):
    torch.manual_seed(0)
    return torch.randn(rows, deep), torch.randn(deep, wide), torch.randn(wide)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_products_are_those_of_float64(products, rows, transposed):
    left, right, bias = matrices(rows)
    right = right.t().contiguous().t() if transposed else right
    found = (
        left @ right,
        torch.addmm(bias, left, right),
        nn.functional.linear(left.view(1, rows, -1), right.t(), bias)[0],
    )
    exact = left.double() @ right.double()
    for product, expected in zip(found, (exact, exact + bias, exact + bias), strict=True):
        torch.testing.assert_close(product.double(), expected, rtol=1e-5, atol=1e-3)
    assert products == [(rows, LONG, WIDE, False), *[(rows, LONG, WIDE, True)] * 2]


def test_gradients_of_both_orders_are_those_of_torch(products):
    left, right, bias = ((0.05 * x).requires_grad_() for x in matrices())

    def orders(*tensors):
        product = torch.addmm(tensors[2], tensors[0], tensors[1]).tanh() @ tensors[1].t()
        first = torch.autograd.grad(product.square().mean(), tensors, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    found, count = orders(left, right, bias), len(products)
    assert count >= 6, "forward and backward"
    for gradient, expected in zip(found, plain(orders, left, right, bias), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert len(products) == count, "none while it is switched off"


def others():
    left, right, bias = matrices()
    yield "a small matrix", torch.mm, (left[:, :20], right[:20])
    yield "a sum over a vocabulary", torch.mm, (torch.randn(ROWS, 10_000), torch.randn(10_000, 60))
    yield "a gradient of weights", torch.mm, (torch.randn(ROWS, LONG).t(), torch.randn(ROWS, 10_000))
    yield "columns that lie apart", torch.mm, (left, torch.randn(LONG, 2 * WIDE)[:, ::2])
    yield "float64", torch.mm, (left.double(), right.double())
    yield "bfloat16", torch.mm, (left.bfloat16(), right.bfloat16())
    yield "no rows", torch.mm, (left[:0], right)
    yield "a factor", lambda *x: torch.addmm(*x, alpha=2), (bias, left, right)
    yield "a sum with a matrix", torch.addmm, (torch.randn(ROWS, WIDE), left, right)
    yield "one bias for all", torch.addmm, (bias[:1], left, right)


@pytest.mark.parametrize(("function", "tensors"), [pytest.param(*case[1:], id=case[0]) for case in others()])
def test_other_products_stay_as_they_are(products, function, tensors):
    torch.testing.assert_close(function(*tensors), plain(function, *tensors))
    assert not products


@pytest.mark.parametrize("wrong", [(WIDE, LONG), (LONG,), (2, LONG, WIDE)])
def test_errors_are_those_of_torch(products, wrong):
    left, right = torch.randn(ROWS, LONG), torch.randn(wrong)
    messages = []
    for product in (torch.mm, lambda *x: plain(torch.mm, *x)):
        with pytest.raises(RuntimeError) as caught:
            product(left, right)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and not products


def test_a_language_model_computes_what_it_did(products):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1500, n_embd=512, n_layer=2, n_head=4, n_positions=32)
    model, ids = GPT2LMHeadModel(config).eval(), torch.randint(1500, (3, 20))

    def compute():
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        return output.logits, *(p.grad.clone() for p in model.parameters())

    found = compute()
    assert {shape[1:] for shape in products} >= {(512, 2048, True), (2048, 512, True), (512, 1500, False)}
    for number, expected in zip(found, plain(compute), strict=True):
        torch.testing.assert_close(number, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_little_memory_is_kept_of_shapes_that_come_once():
    command = [sys.executable, "-c", PROGRAM]
    others = {name: value for name, value in os.environ.items() if name not in matrix_products._KEPT_SHAPES}
    grown = [
        int(subprocess.run(command, env=others | chosen, capture_output=True, text=True, check=True).stdout)
        for chosen in ({}, dict.fromkeys(matrix_products._KEPT_SHAPES, "1024"))
    ]
    assert 2 * grown[0] < grown[1], "unless the environment says how many"


@pytest.mark.parametrize(
    ("maker", "capability", "platform", "expected"),
    [
        ("AuthenticAMD", "AVX512", "linux", True),
        ("GenuineIntel", "AVX512", "linux", False),
        ("AuthenticAMD", "AVX2", "linux", False),
        ("AuthenticAMD", "AVX512", "win32", False),
    ],
)
def test_where_it_is_the_faster_one(monkeypatch, maker, capability, platform, expected):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "read_text", lambda self: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert suits_onednn() is (expected and torch.backends.mkl.is_available())
    assert plain(suits_onednn) is False
