"""The tests see: each of these faults, planted into a kernel's source, makes a check fail."""

import importlib
import importlib.util
import sys
from itertools import product
from pathlib import Path

import pytest
import test_matmul
import test_rows
import test_sample
import test_state
import torch
from paged_case import PagedCase, make_args
from triton.runtime.jit import KernelInterface

F32 = torch.float32


def attend(name="plain", lens=((40, 1), (21, 6)), **shape):
    def check(device, seed):
        case = PagedCase(list(lens), device=device, **shape)
        case.check(make_args(name, case.heads, device))

    return check


def run(test, *arguments):
    return lambda device, seed: test(*arguments, device)


def sampled(device, seed):
    for more, ties in product(range(4), (True, False)):  # one seed may draw what it would draw anyway
        test_sample.test_each_row_draws_what_a_sort_would_draw(ties, 16, seed + more, device)


FAULTS = {  # what is wrong: (file, text, text in its place, check that must fail)
    "window off by one": ("attention_tile", "position - window + 1", "position - window", attend("window")),
    "no causal mask": ("attention_tile", " & (at[None, :] <= row_last[:, None])", "", attend()),
    "wrong scale": ("attention_tile", "scores *= scale", "scores *= scale * 1.001", attend()),
    "unmerged split": ("merge_splits", "acc * shrink + tl.sum(parts * weights[:, None], 0)", "tl.max(parts, 0)", attend()),
    "chunk begins late": ("attention_tile", "position // chunk * chunk", "position // chunk * chunk + 1", attend("chunk")),
    "no softcap": ("attention_tile", "tanh(scores) * cap", "scores * cap", attend("softcap")),
    "ALiBi upside down": ("attention_tile", "scores -= slope", "scores += slope", attend("alibi")),
    "distances past the table": ("attention_tile", "tl.minimum(distance, distances - 1)", "tl.minimum(distance, distances - 2)", attend("table")),
    "another head's table": ("attention_tile", "head[:, None] * distances", "(head[:, None] + 1) % 4 * distances", attend("table")),
    "old sums not scaled": ("attention_tile", "acc * shrink[:, None]", "acc", attend()),
    "old total not scaled": ("attention_tile", "total * shrink +", "total +", attend()),
    "rest of K forgotten": ("attention_tile", "if K_REST > 0", "if K_REST > 999", attend(k_dim=40)),
    "rest of V forgotten": ("attention_tile", "if V_REST > 0", "if V_REST > 999", attend(v_dim=40)),
    "wrong block": ("attention_tile", "table + at // BLOCK_SIZE", "table + (at - at % 2) // BLOCK_SIZE // 2", attend()),
    "wrong slot": ("attention_tile", "offset = at % BLOCK_SIZE", "offset = (at + 1) % BLOCK_SIZE", attend()),
    "reads past the context": ("attention_tile", "(at < end)", "(at < end + 1)", attend(lens=((5, 1), (7, 3)))),
    "splits overlap": ("paged_decode", "tl.maximum(split * SPLIT,", "tl.maximum(split * SPLIT // 2,", attend()),
    "splits weigh alike": ("paged_decode", "peak + tl.log2(some)", "peak", attend()),
    "merge forgets the sink": ("merge_splits", "total = 1.0", "total = 0.0", attend("sinks")),
    "one split forgets the sink": ("paged_decode", "tl.exp2(sink - higher) + weight", "tl.exp2(sink - higher) * 0.5 + weight", attend("sinks", ((9, 1),))),
    "prefill forgets the sink": ("paged_prefill", "total += 1.0", "total += 0.0", attend("sinks")),
    "prefill forgets the prefix": ("paged_prefill", "position = context - queries + token", "position = token", attend()),
    "heads mixed up": ("paged_prefill", "head += kv_head * group", "head += kv_head", attend()),
    "tiles overlap": ("paged_prefill", "(rows < BLOCK_M // heads * heads)", "(rows < BLOCK_M)", attend(group=3, lens=((30, 20),))),
    "K/V to the wrong slot": ("write_kv", "offset = slot % BLOCK_SIZE", "offset = slot // 4 % BLOCK_SIZE", attend()),
    "norm over the padding": ("rms_norm", "/ size", "/ PADDED", run(test_rows.test_rms_norm, 100, True, True, F32)),
    "heads of a norm mixed up": ("rms_norm", "row % heads * x_head", "row % heads * x_head // 2", run(test_rows.test_rms_norm_of_strided_heads)),
    "another row is picked": ("rms_norm", "tl.load(picked + row)", "tl.load(picked + row // 2)", run(test_rows.test_rms_norm_of_rows_that_are_picked)),
    "residual not counted": ("rms_norm", "h += tl.load(", "h -= tl.load(", run(test_rows.test_rms_norm, 100, True, True, F32)),
    "rotation backwards": ("rotary", "rounded(b * c, dtype, WIDEN).to(tl.float32) +", "rounded(b * c, dtype, WIDEN).to(tl.float32) -", run(test_rows.test_rotary, 3, 16, 8, False, F32)),
    "rest not copied": ("rotary", "if COPIES", "if not COPIES", run(test_rows.test_rotary, 2, 20, 6, False, F32)),
    "pairs mixed up": ("rotary", "if INTERLEAVED", "if not INTERLEAVED", run(test_rows.test_rotary, 3, 16, 8, True, F32)),
    "gate is up": ("gated_activation", "x_token + inner + place", "x_token + place", run(test_rows.test_gated_activation, "silu", F32)),
    "gelu of the wrong kind": ("gated_activation", 'ACTIVATION == "gelu"', 'ACTIVATION != "gelu"', run(test_rows.test_gated_activation, "gelu", F32)),
    "top-k ignored": ("sample", "if k < vocab", "if k < 0", sampled),
    "top-p reaches too far": ("sample", "goal = top_p * mass", "goal = top_p * mass * 1.3", sampled),
    "min-p ignored": ("sample", "min_ps + place).to(tl.float32)", "min_ps + place).to(tl.float32) * 0.0", sampled),
    "another step's number": ("sample", "(step + 1)", "(step + 2)", sampled),
    "nibbles swapped": ("dequant_matmul", "two & 15, two >> 4", "two >> 4, two & 15", run(test_matmul.test_dequantize_and_multiply, "awq and gptq", F32)),
    "middle code is no zero": ("dequant_matmul", "code.to(tl.float32) - MIDDLE", "code.to(tl.float32)", run(test_matmul.test_dequantize_and_multiply, "4 bits around the middle", F32)),
    "table is not read": ("dequant_matmul", "code = tl.load(table + code.to(tl.int32))", "code = code.to(tl.float32)", run(test_matmul.test_dequantize_and_multiply, "nf4", F32)),
    "first group's scales for all": ("dequant_matmul", "start // group", "0 // group", run(test_matmul.test_dequantize_and_multiply, "awq and gptq", F32)),
    "wrong expert": ("grouped_matmul", "expert.to(tl.int64) * weights_expert", "(expert // 2).to(tl.int64) * weights_expert", run(test_matmul.test_grouped_matmul_gives_each_row_its_experts_weight, [5, 0, 19], F32)),
    "state does not decay": ("gated_linear_attention", "s *= tl.exp(", "s *= 0.0 * tl.exp(", run(test_state.test_gated_linear_attention, True, False, F32)),
    "delta rule without the delta": ("gated_linear_attention", "(value - tl.sum(s * key[:, None], 0))", "value", run(test_state.test_gated_linear_attention, True, False, F32)),
    "groups mixed up": ("mamba2_step", "head // (HEADS // GROUPS)", "head % GROUPS", run(test_state.test_mamba2_step, False, F32)),
    "step not clamped": ("mamba2_step", "tl.minimum(tl.maximum(step, dt_min), dt_max)", "step", run(test_state.test_mamba2_step, False, F32)),
}  # fmt: skip
QUICK = ("window off by one", "no causal mask", "wrong scale", "unmerged split")


def plant(monkeypatch, folder, name, text, fault):
    """Put functions of a faulty copy of core/kernels/<name>.py in the place of the right ones, wherever imported.

    Kernels that call them are put in place anew as well: on a GPU they keep the machine code of what they called.
    """
    source = Path(importlib.import_module(f"core.kernels.{name}").__file__).read_text()
    assert text in source, f"core/kernels/{name}.py no longer holds {text!r}: adapt the table"
    anew = {name: source.replace(text, fault)}
    while anew:
        name, source = anew.popitem()
        for user in put_in_place(monkeypatch, folder, name, source):
            anew[user] = Path(importlib.import_module(f"core.kernels.{user}").__file__).read_text()


def put_in_place(monkeypatch, folder, name, source):
    """Return the names of the other modules of kernels that use functions of this one."""
    right, users = importlib.import_module(f"core.kernels.{name}"), set()
    file = folder / f"anew_{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, copy)  # where dataclasses look up their module
    spec.loader.exec_module(copy)
    kernels = {key: value for key, value in vars(right).items() if defined_in(right, value)}
    loaded = {key: module for key, module in sys.modules.items() if key.startswith("core.kernels.")}
    for (path, module), (key, value) in product(loaded.items(), kernels.items()):
        if vars(module).get(key) is value:
            monkeypatch.setattr(module, key, getattr(copy, key))
            if module is not right and any(defined_in(module, other) for other in vars(module).values()):
                users.add(path.removeprefix("core.kernels."))
    return users


def defined_in(module, value):
    return isinstance(value, KernelInterface) and value.fn.__module__ == module.__name__


@pytest.mark.parametrize("what", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in FAULTS])
def test_a_planted_fault_is_caught(what, monkeypatch, tmp_path, fresh_inputs, device):
    name, text, fault, check = FAULTS[what]
    plant(monkeypatch, tmp_path, name, text, fault)
    with pytest.raises(AssertionError):
        check(device, fresh_inputs)
