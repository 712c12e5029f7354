"""A checkpoint's own transformers module, with its weights, on its device."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from torch import nn

from core.contracts import Checkpoint, QuantMethod
from core.errors import CheckpointError, CoreError
from core.model_loader import BuildContext
from core.quant_weights import by_transformers, says_nothing
from core.spec import ModelSpec
from core.weights import files_of

logger = logging.getLogger("core_serve.hf_fallback")


def load_module(checkpoint: Checkpoint, context: BuildContext) -> nn.Module:
    """Return the model in eval mode. Raises CheckpointError naming every missing, left-over or misshapen tensor."""
    if context.quant_method is not None and by_transformers(context.quant_method):
        return _load_by_transformers(checkpoint, context, context.quant_method)
    if checkpoint.spec.quantization_config is None:
        _refuse_integers(checkpoint)
    if context.quant_method is not None:
        import core_hf_fallback.quantized  # noqa: F401 - two threads that import transformers at once find half of it
    try:
        with ThreadPoolExecutor(1) as reader:
            # Decoding a file takes a second, and so does importing transformers: they go side by side.
            is_read = context.quant_method is not None or checkpoint.spec.format != "hf"
            tensors = reader.submit(_read, checkpoint, context) if is_read else None
            model, info = _from_pretrained(checkpoint, context, tensors)
    except CoreError:
        raise
    except Exception as error:  # transformers, the checkpoint's own code, a damaged file: anything may be raised
        raise CheckpointError(
            f"transformers cannot load {checkpoint.spec.path}: {type(error).__name__}: {error}"
        ) from error
    _check(checkpoint, info)
    if context.quant_method is None:
        return model.eval().to(context.device)
    from core_hf_fallback.quantized import settle

    return settle(model, context.device)


def _refuse_integers(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for whole numbers that no method reads: transformers would take them as floats."""
    holds_integers = getattr(checkpoint, "holds_integers", None)  # of checkpoints that are Hugging Face folders
    if holds_integers is None:
        return
    found = [name for name in checkpoint.tensor_names() if name.endswith(".weight") and holds_integers(name)]
    if found:
        raise CheckpointError(
            f"{checkpoint.spec.path} holds {found[0]}{files_of(checkpoint, found[:1])} as whole numbers, and its "
            "config has no quantization_config that says what they stand for."
        )


def _load_by_transformers(checkpoint: Checkpoint, context: BuildContext, method: QuantMethod) -> nn.Module:
    """Let transformers build the quantized layers. Raises CheckpointError saying what is missing, or why it cannot."""
    logger.info("%s: transformers' own quantized layers, as its library runs them", method.name)
    quantized = f"{checkpoint.spec.path} is quantized with {method.name!r}, which only transformers reads"
    try:
        return load_module(checkpoint, replace(context, quant_method=None))
    except CheckpointError as error:
        if not isinstance(error.__cause__, ImportError):
            raise CheckpointError(f"{quantized}. {error}") from error
        library = getattr(method, "library", method.name)
        raise CheckpointError(
            f"{quantized}, and it needs a library that is not here: pip install {library} ({error.__cause__})"
        ) from error
    except (TypeError, AssertionError, IndexError) as error:  # the library's
        raise CheckpointError(f"{quantized}, and its library fails: {type(error).__name__}: {error}") from error


def _read(checkpoint: Checkpoint, context: BuildContext) -> dict[str, Any]:
    """Return the arguments for `from_pretrained` that hold the tensors."""
    if context.quant_method is None:
        return {"state_dict": dict(checkpoint.tensors())}
    from core_hf_fallback.quantized import arguments_of

    return arguments_of(checkpoint, context.quant_method, context.dtype)


def _from_pretrained(
    checkpoint: Checkpoint, context: BuildContext, tensors: Future[dict[str, Any]] | None
) -> tuple[Any, dict[str, Any]]:
    """Return the module and transformers' report; `tensors` for what transformers does not open by itself."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = _config(checkpoint.spec, context)
    model_class = _model_class(checkpoint.spec, config, context)
    # Names in the file may differ from the module's; transformers' own loader knows how to rename and fuse them.
    arguments: dict[str, Any] = {"config": config, "dtype": context.dtype, "output_loading_info": True}
    arguments["ignore_mismatched_sizes"] = True  # they are refused by _check, which names them
    if tensors is not None:
        return _from_tensors(model_class, arguments, tensors, is_quantized=context.quant_method is not None)
    if checkpoint.spec.auto_map and context.options.trust_remote_code:
        arguments["trust_remote_code"] = True
    model, info = model_class.from_pretrained(str(checkpoint.spec.path), **arguments)
    return model, info


def _from_tensors(
    model_class: Any, arguments: dict[str, Any], tensors: Future[dict[str, Any]], is_quantized: bool
) -> tuple[Any, dict[str, Any]]:
    if is_quantized:
        drop_quantization(arguments["config"])
        arguments["experts_implementation"] = "eager"  # one at a time: the others would make floats of all of them
    read = tensors.result()
    model, info = model_class.from_pretrained(None, **arguments, **read)
    if is_quantized:
        info["unexpected_keys"] = _left_over(info["unexpected_keys"], read["state_dict"])
    return model, info


def drop_quantization(config: Any) -> None:
    """Take quantization_config out of a config, so that the module is built plain."""
    for one in (config, config.get_text_config()):
        if hasattr(one, "quantization_config"):
            del one.quantization_config


def _left_over(names: Iterable[str], state_dict: Mapping[str, Any]) -> list[str]:
    return [name for name in names if name not in state_dict or not says_nothing(name, state_dict[name][...])]


def _config(spec: ModelSpec, context: BuildContext) -> Any:
    from transformers import AutoConfig

    if spec.format == "hf":
        return AutoConfig.from_pretrained(str(spec.path), trust_remote_code=context.options.trust_remote_code)
    values = {name: value for name, value in spec.config.items() if name != "model_type"}
    return AutoConfig.for_model(spec.model_type, **values)


def _model_class(spec: ModelSpec, config: Any, context: BuildContext) -> Any:
    """The class that saved the checkpoint, where transformers has it: the Auto class does not map every text config."""
    import transformers

    reference = spec.auto_map.get("AutoModelForCausalLM")
    if reference and context.quant_method is None:
        return transformers.AutoModelForCausalLM
    if reference and context.options.trust_remote_code:  # Auto reads such a class only beside weights of its own
        return transformers.dynamic_module_utils.get_class_from_dynamic_module(reference, str(spec.path))
    named = getattr(transformers, spec.architecture, None) if spec.architecture else None
    if isinstance(named, type) and hasattr(named, "generate"):
        return named
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    raise CheckpointError(
        f"{spec.path} was saved by {spec.architecture or 'an unnamed class'}; transformers has no causal language "
        f"model of that name, nor one for model type {spec.model_type!r}."
    )


def _check(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        entries = sorted(map(str, info.get(kind) or ()))
        if entries:
            more = f" and {len(entries) - 10} more" if len(entries) > 10 else ""
            names = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in info[kind]]
            where = files_of(checkpoint, names)
            problems.append(f"{kind.replace('_', ' ')}: {', '.join(entries[:10])}{more}{where}")
    if problems:
        raise CheckpointError(f"The tensors of {checkpoint.spec.path} do not fit its class. {'; '.join(problems)}.")
