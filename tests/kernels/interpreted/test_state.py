"""State updates of one decode step: gated linear attention and Mamba-2. Each beside its plain torch twin."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near, poisoned

from core.kernels.gated_linear_attention import gated_linear_attention
from core.kernels.mamba2_step import mamba2_step

SLOTS = [4, 0, -1]  # of five; the last request is padding


def plain_linear_attention(state, q, k, v, decay, scale, beta):
    """One request, float64: state [heads, k, v]."""
    gate = decay.exp()
    state = state * (gate[:, :, None] if gate.dim() == 2 else gate[:, None, None])
    if beta is not None:
        v = beta[:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
    state = state + k[:, :, None] * v[:, None, :]
    return state, scale * torch.einsum("hkv,hk->hv", state, q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_dim", [False, True], ids=["gate by head", "gate by dimension"])
@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta rule"])
def test_gated_linear_attention(delta, by_dim, dtype, device):
    heads, k_dim, v_dim = 2, 12, 40
    state = torch.randn(5, heads, k_dim, v_dim, device=device)
    q, k = (torch.randn(3, heads, k_dim, device=device).to(dtype) / 3 for _ in range(2))
    v = torch.randn(3, heads, v_dim, device=device).to(dtype)
    decay = -torch.rand(3, heads, *([k_dim] if by_dim else []), device=device)
    beta = torch.rand(3, heads, device=device) if delta else None
    out, moved = poisoned(3, heads, v_dim, dtype=dtype, device=device), state.clone()
    gated_linear_attention(moved, q, k, v, decay, torch.tensor(SLOTS, device=device), out, 0.5, beta)
    for request, slot in enumerate(SLOTS[:2]):
        given = [x[request].double() for x in (q, k, v, decay)]
        strength = None if beta is None else beta[request].double()
        after, answer = plain_linear_attention(state[slot].double(), *given, 0.5, strength)
        assert_near(moved[slot], after)
        assert_near(out[request], answer, dtype)
    assert torch.equal(moved[1:4], state[1:4])
    assert out[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gated"])
def test_mamba2_step(gated, dtype, device):
    heads, head_dim, groups, states = 4, 40, 2, 12
    state = torch.randn(5, heads, head_dim, states, device=device)

    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    x, dt, b, c = random(3, heads, head_dim), random(3, heads) * 3, random(3, groups, states), random(3, groups, states)
    z = random(3, heads, head_dim) if gated else None
    a, d, dt_bias = -torch.rand(heads, device=device) - 0.1, random(heads), random(heads)
    y, moved = poisoned(3, heads, head_dim, dtype=dtype, device=device), state.clone()
    mamba2_step(moved, x, dt, dt_bias, a, b, c, d, torch.tensor(SLOTS, device=device), y, z, (0.01, 2.0))
    for request, slot in enumerate(SLOTS[:2]):
        step = F.softplus(dt[request].double() + dt_bias.double()).clamp(0.01, 2.0)
        into, out_of = (m[request].double().repeat_interleave(heads // groups, 0) for m in (b, c))
        inputs = torch.einsum("h,hp,hn->hpn", step, x[request].double(), into)
        after = state[slot].double() * (step * a.double()).exp()[:, None, None] + inputs
        wanted = torch.einsum("hpn,hn->hp", after, out_of) + d.double()[:, None] * x[request].double()
        if z is not None:
            wanted = wanted * F.silu(z[request].double())
        assert_near(moved[slot], after)
        assert_near(y[request], wanted, dtype)
    assert torch.equal(moved[1:4], state[1:4])
