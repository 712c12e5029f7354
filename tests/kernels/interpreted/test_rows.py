"""Kernels that work on rows: norm, rotary, gates, and the writing of K/V. Each beside its plain torch twin."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, poisoned

from core.errors import KernelError
from core.kernels.gated_activation import gated_activation
from core.kernels.rms_norm import rms_norm
from core.kernels.rotary import rotary
from core.kernels.write_kv import write_kv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain_rms_norm(x, weight, eps):
    h = x.double()
    return h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "wide", "has_residual"), [(64, False, False), (100, True, True), (1, False, True)])
def test_rms_norm(size, wide, has_residual, dtype, device):
    x, residual = (torch.randn(3, size, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(size, device=device).to(torch.float32 if wide else dtype)  # Gemma's is float32
    out, total = poisoned(3, size, dtype=dtype, device=device), x
    summed = residual.clone()
    if has_residual:
        total = (x.float() + residual.float()).to(dtype)
    rms_norm(x, weight, 1e-5, out, summed if has_residual else None)
    assert_near(out, plain_rms_norm(total, weight, 1e-5), dtype)
    if has_residual:
        assert torch.equal(summed, total)


def test_rms_norm_of_strided_heads(device):
    x, weight = torch.randn(3, 5 * 16, device=device)[:, 16:64].unflatten(1, (3, 16)), torch.randn(16, device=device)
    out = poisoned(3, 3, 16, device=device)
    rms_norm(x, weight, 1e-5, out)
    assert_near(out, plain_rms_norm(x, weight, 1e-5))


def plain_rotary(x, cos, sin, interleaved):
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    turned, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("heads", "dim", "half"), [(3, 16, 8), (2, 20, 6), (1, 6, 3)])
def test_rotary(heads, dim, half, interleaved, dtype, device):
    x = torch.randn(4, heads, dim, device=device).to(dtype)
    angles = torch.randn(4, half, device=device) * 3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = poisoned(4, heads, dim, dtype=dtype, device=device)
    rotary(x, cos, sin, out, interleaved)
    assert_near(out, plain_rotary(x, cos, sin, interleaved), dtype)
    rotary(x, cos, sin, x, interleaved)  # in place
    assert torch.equal(x, out)


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activation(name, dtype, device):
    x = (torch.randn(3, 2 * 1030, device=device) * 3).to(dtype)
    out = poisoned(3, 1030, dtype=dtype, device=device)
    gated_activation(x, out, name)
    gate, up = x.double().chunk(2, -1)
    assert_near(out, ACTIVATIONS[name](gate) * up, dtype)


def test_rms_norm_of_rows_that_are_picked(device):
    x, weight = torch.randn(9, 50, device=device)[:, :49], torch.randn(49, device=device)
    rows = torch.tensor([8, 0, 0, 5], device=device)
    out = poisoned(4, 49, device=device)
    rms_norm(x, weight, 1e-5, out, rows=rows)
    assert_near(out, plain_rms_norm(x[rows], weight, 1e-5))


@pytest.mark.parametrize("heads_first", [False, True], ids=["slots first", "heads first"])
def test_write_kv_fills_the_slots_it_is_given_and_no_others(heads_first, device):
    keys, values = poisoned(5, 4, 3, 6, device=device), poisoned(5, 4, 3, 10, device=device)
    if heads_first:
        keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values))
    k, v = torch.randn(4, 3, 6, device=device), torch.randn(3, 4, 10, device=device).transpose(0, 1)
    slots = torch.tensor([7, 19, -1, 0], device=device)
    write_kv(k, v, keys, values, slots)
    for cache, new in ((keys, k), (values, v)):
        wanted = torch.full_like(cache, torch.nan)
        for token, slot in ((0, 7), (1, 19), (3, 0)):
            wanted[slot // 4, slot % 4] = new[token]
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)


def test_write_kv_rounds_to_the_caches_dtype(device):
    k = torch.randn(1, 2, 16, device=device)
    keys = poisoned(1, 1, 2, 16, dtype=torch.bfloat16, device=device)
    values = keys.clone()
    write_kv(k, k, keys, values, torch.tensor([0], device=device))
    assert torch.equal(keys[0], k.bfloat16())


def test_no_tokens_are_no_launch(device):
    x = torch.empty(0, 16, device=device)
    rms_norm(x, torch.ones(16, device=device), 1e-5, x)


REFUSED = {
    r"rms_norm: out must have shape \[3, 8\], got \[3, 9\]": {"out": torch.empty(3, 9)},
    "rms_norm: weight must be float32, got int64": {"weight": torch.ones(8, dtype=torch.int64)},
    r"rms_norm: x must have its last dimension contiguous \(stride 1\), got strides \[1, 3\]": {
        "x": torch.ones(8, 3).T
    },
    "rms_norm: weight is on meta, but the other tensors are on cpu": {"weight": torch.ones(8, device="meta")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_tensor_that_does_not_fit_is_refused_by_name(message):
    given = {"x": torch.ones(3, 8), "weight": torch.ones(8), "eps": 1e-5, "out": torch.ones(3, 8)}
    with pytest.raises(KernelError, match=message):
        rms_norm(**given | REFUSED[message])
