"""Checkpoints that bitsandbytes made, and float ones on the fly, answer like their decoded weights."""

import pytest
import torch
import transformers.integrations.bitsandbytes as integration

from core.layers import QuantizedTensor, TransposedTensor
from core.testing import assert_matches_dequantized
from core.weights import HFCheckpoint
from core_quant_bnb.read import read_tensors

KINDS = ["nf4", "nf4-double", "fp4", "fp4-double", "int8", "nf4-bfloat16", "nf4-skip"]


def _bnb_floats(module):
    """Return every weight as bitsandbytes itself decodes it."""
    found = {}
    for path, part in module.named_modules():
        weight = getattr(part, "weight", None)
        if weight is not None:
            state = getattr(part, "state", None)
            found[f"{path}.weight"] = integration.dequantize_bnb_weight(weight, state).detach()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_is_what_bitsandbytes_decodes(bnb_folder, kind):
    folder, module = bnb_folder(kind)
    read, wanted = dict(read_tensors(HFCheckpoint(folder), torch.float32)), _bnb_floats(module)
    assert set(read) == set(wanted)
    for name, tensor in read.items():
        floats = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor
        assert torch.equal(floats, wanted[name]), name


def test_skipped_modules_are_floats_and_all_other_linears_are_not(bnb_folder):
    read = dict(read_tensors(HFCheckpoint(bnb_folder("nf4-skip")[0]), torch.float32))
    small = {name for name, tensor in read.items() if isinstance(tensor, QuantizedTensor)}
    linears = {name for name, tensor in read.items() if tensor.dim() == 2 and "embed" not in name}
    skipped = {name for name in linears if "lm_head" in name or "layers.0.mlp" in name or "k_proj" in name}
    assert skipped
    assert small == linears - skipped


@pytest.mark.parametrize("impl", ["native_llama", "transformers"])
@pytest.mark.parametrize("kind", ["nf4-double", "fp4", "int8", "nf4-skip"])
def test_a_checkpoint_answers_like_its_decoded_weights(bnb_folder, kind, impl):
    assert impl in assert_matches_dequantized(bnb_folder(kind)[0], impl)


@pytest.mark.parametrize("impl", ["native_llama", "transformers"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_float_model_is_made_small_on_the_fly(float_folder, kind, impl):
    assert impl in assert_matches_dequantized(float_folder, impl, quantization=f"bitsandbytes-{kind}")


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_conv1d_weights_lie_as_in_a_float_checkpoint(bnb_gpt2, kind):
    folder, module = bnb_gpt2(kind)
    read, decoded = dict(read_tensors(HFCheckpoint(folder), torch.float32)), _bnb_floats(module)
    name = "transformer.h.0.attn.c_proj.weight"  # square, so that no shape would give a mistake away
    assert isinstance(read[name], TransposedTensor)
    assert torch.equal(read[name], decoded[name].T)
    assert_matches_dequantized(folder, "transformers")


def test_on_the_fly_gives_what_a_saved_checkpoint_holds(bnb_folder, float_folder):
    from core_quant_bnb.method import BnbOnTheFly

    for kind in ("nf4", "int8"):
        saved = dict(read_tensors(HFCheckpoint(bnb_folder(kind)[0]), torch.float32))
        method = BnbOnTheFly(kind)
        for name, weight in HFCheckpoint(float_folder).tensors():
            if isinstance(saved[name], QuantizedTensor):
                made = method.quantize(name, weight)
                assert all(torch.equal(made.parts[part], saved[name].parts[part]) for part in made.parts), name
            elif name == "lm_head.weight":
                assert method.quantize(name, weight) is weight
