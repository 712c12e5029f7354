"""layer-stack: the layers of transformers' module in one call, with the numbers of the layers one by one."""

import pytest
import torch

from core import LLM, SamplingParams
from core.errors import CoreError
from core.layers import LayerStack
from core.testing import tiny_checkpoint
from core_hf_fallback.patches.layer_stack import FirstLayer, LaterLayer, Shared
from core_hf_fallback.patches.stack_head import Ahead

pytest.importorskip("core_cpu_kernels", reason="not installed where there is no C++ compiler")

PROMPTS = [{"prompt_token_ids": ids} for ids in ([5], list(range(7, 26)), list(range(5, 65)))]
LAYERS = {"llama": 4, "qwen3": 4, "mixtral": 0, "gemma3_text": 0}  # experts and four norms are no such layers


@pytest.fixture(autouse=True)
def every_linear_has_a_kernel(monkeypatch):
    """Float32 weights too, as they lie."""
    monkeypatch.setattr("core.layers.linear.can_pack", lambda weight: False)


@pytest.fixture
def together(monkeypatch):
    """The numbers of layers that ran in one call, call by call."""
    found, run = [], LayerStack.run

    def noted(stack, *args):
        done = run(stack, *args)
        found.append(stack.count if done else 0)
        return done

    monkeypatch.setattr(LayerStack, "run", noted)
    return found


def open_llm(folder, **options):
    return LLM(
        model=str(folder), skip_tokenizer_init=True, model_impl="transformers", max_num_batched_tokens=32, **options
    )


def answers(llm):
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1)
    outputs = [out.outputs[0] for out in llm.generate(PROMPTS, params)]
    pairs = [zip(output.token_ids, output.logprobs, strict=True) for output in outputs]
    return [[(token, row[token].logprob) for token, row in pair] for pair in pairs]


@pytest.mark.parametrize("model_type", LAYERS)
def test_layers_together_give_the_numbers_of_layers_one_by_one(model_type, together, tmp_path):
    folder = tiny_checkpoint(model_type, tmp_path)
    with open_llm(folder) as llm:
        found = answers(llm)
    assert set(together) == ({LAYERS[model_type]} if LAYERS[model_type] else set())
    with open_llm(folder, disable_patches=("layer-stack",)) as llm:
        assert answers(llm) == found


@pytest.fixture
def llama(tmp_path):
    with open_llm(tiny_checkpoint("llama", tmp_path)) as llm:
        yield llm


def test_layers_that_are_looked_at_run_one_by_one(llama, together):
    wanted, layers = answers(llama), llama._engine.runner.model.module.model.layers
    llama.reset_prefix_cache()
    together.clear()
    seen = []
    handle = layers[1].register_forward_hook(lambda layer, args, out: seen.append(torch.equal(args[0], out)))
    assert answers(llama) == wanted
    assert seen and not any(seen) and not any(together)
    handle.remove()


def test_a_loop_over_the_layers_calls_the_first_alone_and_elsewhere_the_list_is_whole(llama, monkeypatch):
    monkeypatch.setattr(LaterLayer, "__call__", lambda *_, **__: pytest.fail("it has nothing to do"))
    answers(llama)
    layers = llama._engine.runner.model.module.model.layers
    assert len(layers) == len(list(layers)) == len(layers[:]) == 4
    assert list(layers[1:]) == list(layers)[1:]


def test_the_first_layer_alone_runs_the_others_one_by_one_where_the_kernel_does_not(llama, monkeypatch, together):
    wanted = answers(llama)
    llama.reset_prefix_cache()
    together.clear()
    monkeypatch.setattr(Shared, "run", lambda *_: None)
    assert answers(llama) == wanted
    assert not together


def test_a_layer_that_is_called_otherwise_is_an_error_that_names_the_patch(llama, monkeypatch):
    layer = llama._engine.runner.model.module.model.layers[1]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda hidden, **kwargs: forward(hidden + 1, **kwargs))
    with pytest.raises(CoreError, match=r"Layer model.layers.1.self_attn of LlamaForCausalLM .* layer-stack"):
        answers(llama)


def head_of(llm):
    """The norm and the head that the layers' call computes ahead."""
    first = llm._engine.runner.model.module.model.layers._modules["0"].forward
    assert isinstance(first, FirstLayer) and first.shared.head is not None
    return first.shared.head


def test_a_step_that_only_decodes_has_its_logits_from_the_layers_call(llama):
    head, multiplied = head_of(llama), []
    run = head.head.kernel
    head.head.kernel = lambda x: multiplied.append(len(x.flatten(0, -2))) or run(x)
    llama.generate(PROMPTS[1], SamplingParams(max_tokens=6, ignore_eos=True))
    assert head.is_used and multiplied == [1]  # the prompt's last token


def test_a_long_prompt_goes_on_with_the_wanted_rows_once_the_head_was_seen_to_take_no_others(tmp_path, monkeypatch):
    folder, rows, run = tiny_checkpoint("llama", tmp_path), [], LayerStack.run

    def noted(stack, x, rotation, attention, logits, wanted):
        if len(x) == 200:
            rows.append(None if wanted is None else wanted.tolist())
        return run(stack, x, rotation, attention, logits, wanted)

    monkeypatch.setattr(LayerStack, "run", noted)
    options = {"skip_tokenizer_init": True, "model_impl": "transformers", "enable_prefix_caching": False}
    prompt, params = [5 + i % 90 for i in range(200)], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(model=str(folder), **options) as llm:
        head_of(llm).was_used = False
        found = [llm.generate(prompt, params)[0].outputs[0].token_ids for _ in range(2)]
    assert rows == [None, [199]]
    with LLM(model=str(folder), disable_patches=("layer-stack",), **options) as llm:
        assert found == [llm.generate(prompt, params)[0].outputs[0].token_ids] * 2


def test_a_head_that_is_given_something_else_multiplies_it(llama):
    answers(llama)
    head = head_of(llama)
    x = torch.randn(1, 3, head.head.in_features)
    wanted = head.head(x)
    assert torch.allclose(wanted, torch.nn.functional.linear(x, head.head.weight), atol=1e-5)
    head.ahead = Ahead(torch.zeros_like(x), torch.zeros(3, 5), normed=torch.zeros_like(x))
    assert torch.equal(head.head(x), wanted) and not head.is_used


def test_a_model_that_changes_what_its_norm_gives_keeps_its_logits(tmp_path):
    folder = tiny_checkpoint("llama", tmp_path)
    with open_llm(folder) as llm:
        module, head = llm._engine.runner.model.module, head_of(llm)
        model = module.model.forward

        def doubled(*args, **kwargs):
            out = model(*args, **kwargs)
            out.last_hidden_state = out.last_hidden_state * 2
            return out

        found = answers(llm)
        llm.reset_prefix_cache()
        module.model.forward = doubled
        changed = answers(llm)
        assert not head.is_used and changed != found
    with open_llm(folder, disable_patches=("layer-stack",)) as llm:
        module = llm._engine.runner.model.module
        model = module.model.forward
        module.model.forward = doubled
        assert answers(llm) == changed
