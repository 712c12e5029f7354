"""Patches make a module quicker and change nothing: a rule does its work, can be left out, and is caught if wrong."""

import logging
from importlib.metadata import version

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from core import LLM
from core.errors import ConfigError
from core.testing import assert_matches_transformers, tiny_checkpoint
from core_hf_fallback import versions
from core_hf_fallback.patches import NAMES
from core_hf_fallback.patches import patcher as patching
from core_hf_fallback.patches.calls import linear_calls
from core_hf_fallback.patches.patcher import RULES, Patcher, Rule
from core_hf_fallback.patches.rms_norm import recognise

# Places that each rule changes in a tiny model of so many layers; none: the rule finds nothing of its kind.
MODELS = {
    "llama": {"merged-linears", "rms-norm", "gated-mlp", "attention-block", "decoder-layer"},
    "gemma2": {"merged-linears", "rms-norm", "gated-mlp", "attention-block"},  # 1 + w, softcap, four norms
    "gemma3_text": {"merged-linears", "rms-norm", "gated-mlp", "attention-block"},  # 1 + w, norms of Q and K
    "qwen3": {"merged-linears", "rms-norm", "gated-mlp", "attention-block", "decoder-layer"},  # norms of Q and K
    "phi3": {"rms-norm", "gated-mlp"},  # one linear makes gate and up
    "gpt_neox": set(),  # one linear makes Q, K and V; LayerNorm
    "phi": {"merged-linears", "attention-block"},  # partial rotary, LayerNorm
    "cohere": {"merged-linears", "gated-mlp", "attention-block"},  # interleaved rotary, each angle twice; LayerNorm
    "glm": {"merged-linears", "rms-norm", "gated-mlp", "attention-block", "decoder-layer"},  # partial and interleaved
    "mixtral": {"merged-linears", "rms-norm", "attention-block", "decoder-layer"},  # experts
}
if versions.major_minor(version("transformers")) == versions.OLDEST:
    del MODELS["gemma2"]  # its sdpa attention drops the softcap, so rows serves it: test_tiers.py


@pytest.mark.parametrize("model_type", MODELS)
def test_a_patched_model_answers_like_transformers(model_type, caplog):
    caplog.set_level(logging.INFO, "core_serve.transformers")
    assert assert_matches_transformers(model_type, "transformers", max_tokens=6) == "transformers/paged"
    assert "is left out" not in caplog.text
    for name in set(NAMES) - {"child-lookup", "layer-stack"}:  # a stack needs kernels: test_layer_stack.py
        assert (f"{name} (" in caplog.text) == (name in MODELS[model_type])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def open_llm(folder, **options):
    return LLM(model=str(folder), skip_tokenizer_init=True, model_impl="transformers", **options)


def patches_of(llm):
    """Return all but layer-stack, which needs kernels: test_layer_stack.py."""
    return tuple(name for name in llm._engine.runner.model.features.patches if name != "layer-stack")


def test_the_names_that_can_be_disabled_are_those_of_the_rules():
    assert tuple(rule.name for rule in RULES) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if name != "layer-stack"])
def test_a_patch_can_be_left_out(llama, name):
    without = {name, "decoder-layer"} if name == "rms-norm" else {name}  # a layer is known by its norms
    without.add("grouped-experts")  # there are none
    with open_llm(llama, disable_patches=(name,)) as llm:
        assert patches_of(llm) == tuple(one for one in NAMES if one not in without | {"layer-stack"})


def test_an_unknown_patch_is_refused_with_the_names(llama):
    with pytest.raises(ConfigError, match=r"no patch 'rmsnorm' to disable; there are merged-linears, rms-norm, "):
        open_llm(llama, disable_patches=["rmsnorm"])


def test_explain_lists_the_patches(llama, capsys):
    from core.cli import run

    assert run(["explain", str(llama), "--model-impl", "transformers", "--probe", "--disable-patch", "rms-norm"]) == 0
    patches = "merged-linears, gated-mlp, attention-block, child-lookup"
    assert f"transformers/paged: serves; patches: {patches}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ wrong rules


def scaled_norms(module, calls, kernels):
    """A wrong rule: norms that are a hundredth too large."""
    undo = []
    for part in module.modules():
        if recognise(part) is not None:
            part.forward = lambda x, plain=part.forward: plain(x) * 1.01
            undo.append(lambda part=part: delattr(part, "forward"))
    return undo


def broken_norms(module, calls, kernels):
    """A wrong rule: norms that fail."""
    undo = []
    for part in module.modules():
        if recognise(part) is not None:
            part.forward = None
            undo.append(lambda part=part: delattr(part, "forward"))
    return undo


@pytest.mark.parametrize(
    ("wrong", "reason"), [(scaled_norms, "its logits differ"), (broken_norms, "TypeError: 'NoneType' object")]
)
def test_a_wrong_rule_is_named_and_left_out_and_the_model_serves(llama, wrong, reason, caplog, monkeypatch):
    monkeypatch.setattr(patching, "RULES", (RULES[0], Rule("wrong-norms", wrong), RULES[-1]))
    assert assert_matches_transformers(llama, "transformers", max_tokens=6) == "transformers/paged"
    assert f"patch wrong-norms is left out, it changes this model's results: {reason}" in caplog.text
    with open_llm(llama) as llm:
        assert patches_of(llm) == ("merged-linears", "child-lookup")


# ------------------------------------------------------------------------------------------------ undoing


def load(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def patched(model):
    ids = torch.arange(3, 9)[None]
    with torch.inference_mode():
        with linear_calls(model) as calls:
            wanted = model(input_ids=ids).logits
        patcher = Patcher(model, calls)
        patcher.apply(RULES)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
    return patcher


def test_undone_patches_leave_the_module_as_it_was(llama):
    model = load(llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [(name, type(part)) for name, part in model.named_modules()]
    patcher = patched(model)
    # Attention here is not the host's.
    assert set(patcher.counts) == set(NAMES) - {"attention-block", "grouped-experts", "layer-stack"}
    patcher.undo()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [(name, type(part)) for name, part in model.named_modules()] == kinds
    for part in model.modules():
        assert not {"forward", *part._modules} & set(vars(part))


def test_a_refused_tier_leaves_no_patch_to_the_next_one(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "core_serve.transformers")
    # Attention that is off by a little: the paged tier is wrong with and without patches.
    from core_hf_fallback.interface import Binding

    plain = Binding.attend
    monkeypatch.setattr(Binding, "attend", lambda self, *rest: plain(self, *rest) * 1.01)
    assert assert_matches_transformers("llama", "transformers", max_tokens=4).startswith("transformers/rows")
    assert "is left out" not in caplog.text


def test_a_tied_weight_is_not_merged():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.head.weight = self.one.weight

        def forward(self, x):
            return self.head(self.one(x) + self.two(x))

    assert merged_counts(Tied()) == {}


def merged_counts(model, x=None):
    x = torch.randn(3, 8) if x is None else x
    with torch.inference_mode():
        with linear_calls(model) as calls:
            wanted = model(x)
        patcher = Patcher(model, calls)
        patcher.apply(RULES[:1])
        torch.testing.assert_close(model(x), wanted)
    return patcher.counts


class Pair(nn.Module):
    """Two linears that are called as a function of one's choice says."""

    def __init__(self, forward):
        super().__init__()
        self.one, self.two, self.call = nn.Linear(8, 4), nn.Linear(8, 4), forward

    def forward(self, x):
        return self.call(self, x)


def writes_between(pair, x):
    y = x.clone()
    first = pair.one(y)
    return first + pair.two(y.add_(1))


@pytest.mark.parametrize(
    ("call", "merged"),
    [
        (lambda pair, x: pair.one(x) + pair.two(x), True),
        (lambda pair, x: pair.one(x) + pair.two(x * 1), False),  # equal, but another tensor
        (lambda pair, x: pair.one(x) + pair.one(x) + pair.two(x), False),  # called twice
        (writes_between, False),
    ],
)
def test_linears_are_merged_if_they_are_given_the_same_tensor_once(call, merged):
    assert (merged_counts(Pair(call)) == {"merged-linears": 1}) == merged


def test_merged_linears_are_right_when_they_are_called_otherwise_than_at_load():
    pair = Pair(lambda pair, x: pair.one(x) + pair.two(x))
    one, two = (nn.Linear(8, 4) for _ in range(2))
    one.load_state_dict(pair.one.state_dict()), two.load_state_dict(pair.two.state_dict())
    assert merged_counts(pair)
    x, y = torch.randn(2, 3, 8)
    with torch.inference_mode():
        for part, plain, given in (
            (pair.one, one, x), (pair.one, one, x), (pair.two, two, y), (pair.two, two, x), (pair.one, one, y)
        ):  # fmt: skip
            torch.testing.assert_close(part(given), plain(given))
    torch.testing.assert_close(pair.two.weight, two.weight.detach())
    torch.testing.assert_close(pair.two.bias, two.bias.detach())


# ------------------------------------------------------------------------------------------------ norms


class Norm(nn.Module):
    def __init__(self, formula, size=16):
        super().__init__()
        self.weight, self.eps, self.formula = nn.Parameter(torch.randn(size) * 0.2), 1e-5, formula

    def forward(self, x):
        return self.formula(self, x)


def rms(norm, x, power=2):
    return x * torch.rsqrt(x.pow(power).mean(-1, keepdim=True) + norm.eps)


@pytest.mark.parametrize(
    ("formula", "known"),
    [
        (lambda norm, x: rms(norm, x) * norm.weight, True),
        (lambda norm, x: rms(norm, x) * (1 + norm.weight), True),
        (lambda norm, x: F.layer_norm(x, (16,), norm.weight), False),
        (lambda norm, x: rms(norm, x, power=4) * norm.weight, False),
        (lambda norm, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm.weight, False),  # another eps
        (lambda norm, x: rms(norm, x) * norm.weight + 1e-3, False),
        (lambda norm, x: rms(norm, x.transpose(0, 1)).transpose(0, 1) * norm.weight + x * 0.01, False),
    ],
)
def test_a_norm_is_known_by_what_it_computes(formula, known):
    norm = Norm(formula)
    made = recognise(norm)
    assert (made is not None) == known
    if made is not None:
        x = torch.randn(2, 5, 3, 16)
        torch.testing.assert_close(made(x), norm(x), rtol=1e-5, atol=1e-6)
        assert made(x.half()).dtype == norm(x.half()).dtype


def test_a_norm_with_a_gate_is_left_alone():
    class Gated(Norm):
        def forward(self, x, gate=None):
            return rms(self, x if gate is None else x * gate) * self.weight

    assert recognise(Gated(None)) is None


# ------------------------------------------------------------------------------------------------ feed-forward blocks


class Mlp(nn.Module):
    def __init__(self, formula, inner=24):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, inner), nn.Linear(8, inner), nn.Linear(inner, 8)
        self.act, self.formula = nn.SiLU(), formula

    def forward(self, x):
        return self.formula(self, x)


@pytest.mark.parametrize(
    ("formula", "known"),
    [
        (lambda mlp, x: mlp.down(mlp.act(mlp.gate(x)) * mlp.up(x)), True),
        (lambda mlp, x: mlp.down(F.gelu(mlp.gate(x), approximate="tanh") * mlp.up(x)), True),
        (lambda mlp, x: mlp.down(F.relu(mlp.gate(x)) * mlp.up(x)), True),
        (lambda mlp, x: mlp.down(mlp.act(mlp.gate(x) * 1.01) * mlp.up(x)), False),
        (lambda mlp, x: mlp.down(mlp.act(mlp.gate(x)) * mlp.up(x)) + x, False),
        (lambda mlp, x: mlp.down(mlp.act(mlp.gate(x)) + mlp.up(x)), False),
    ],
)
@pytest.mark.parametrize("rules", [("gated-mlp",), ("merged-linears", "gated-mlp")])
def test_a_gated_block_is_known_by_what_it_computes(formula, known, rules):
    model = nn.Sequential(Mlp(formula))
    x, y = torch.randn(2, 1, 5, 8)
    with torch.inference_mode():
        wanted = model(y)
        with linear_calls(model) as calls:
            model(x)
        patcher = Patcher(model, calls)
        patcher.apply([rule for rule in RULES if rule.name in rules])
        assert ("gated-mlp" in patcher.counts) == known
        torch.testing.assert_close(model(y), wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ unusual calls


def test_a_block_that_is_called_otherwise_than_at_load_uses_its_own_code(llama):
    """Hidden states are what they were when a patched layer is given another mask than the recorded one."""
    from core_hf_fallback.interface import bind
    from core_hf_fallback.paged import PagedModel
    from core_hf_fallback.ropes import Ropes

    module = load(llama)
    binding, ids = bind(module), torch.arange(3, 14)
    with linear_calls(module) as calls:
        PagedModel(module, binding, Ropes(module, 64), ids, len(ids))
    patcher = Patcher(module, calls)
    patcher.apply(RULES)
    assert {"attention-block", "decoder-layer"} <= set(patcher.counts)
    layer, hidden = module.model.layers[0], torch.randn(1, 5, module.config.hidden_size)
    angles = module.model.rotary_emb(hidden, torch.arange(5)[None])
    for config in (module.config, module.model.config):
        config._attn_implementation = "eager"
    with torch.inference_mode():
        found = layer(hidden, attention_mask=torch.zeros(1, 1, 5, 5), position_embeddings=angles)
        patcher.undo()
        wanted = layer(hidden, attention_mask=torch.zeros(1, 1, 5, 5), position_embeddings=angles)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
