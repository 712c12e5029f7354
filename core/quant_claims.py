"""Which quantization method takes a checkpoint: one claim wins, none or several are errors that say what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from core.errors import ConfigError, PluginError

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import QuantMethod
    from core.spec import ModelSpec

# Methods whose plugin is called otherwise.
DISTRIBUTIONS = {"int8": "int", "int4": "int", "auto-round": "gptq", "bitsandbytes": "bnb", "fbgemm_fp8": "fp8"}
DISTRIBUTIONS |= {f"bitsandbytes-{kind}": "bnb" for kind in ("nf4", "fp4", "int8")}
UNNAMED = "unnamed"
OF_OTHERS = (
    "It is none of core-serve's own. What transformers itself reads, its fallback serves: "
    "pip install core-serve-hf-fallback. Or, if you trust a plugin of that name"
)
# Formats of files, which nothing is brought into while it is loaded.
FILE_FORMATS = frozenset({"awq", "gptq", "auto-round", "compressed-tensors", "fp8", "fbgemm_fp8", "gguf"})


def settle_claims(
    claims: Sequence[tuple[str, QuantMethod]], spec: ModelSpec, options: EngineConfig
) -> QuantMethod | None:
    """Return the one method that claims. Raises ConfigError if one is needed and none does, PluginError for several."""
    preferred = [claim for claim in claims if claim[0] in options.prefer or claim[1].name in options.prefer]
    rivals = preferred or list(claims)
    if len(rivals) > 1:
        names = " and ".join(f"{plugin!r} ({method.name})" for plugin, method in rivals)
        raise PluginError(f"Plugins {names} both claim the quantization of {spec.path}. Settle it with --prefer NAME.")
    if not rivals:
        _refuse_unclaimed(spec, options)
        return None
    method = rivals[0][1]
    if method.on_the_fly and spec.quantization_config is not None:
        raise _misfit(spec, options.quantization or method.name)
    return method


def _misfit(spec: ModelSpec, asked: str) -> ConfigError:
    own = _method_name(spec.quantization_config or {})
    return ConfigError(
        f"--quantization {asked} does not fit {spec.path}, which is quantized with {own!r} already. Leave it out."
    )


def _refuse_unclaimed(spec: ModelSpec, options: EngineConfig) -> None:
    """Raise ConfigError if a quantization is named and nobody took it."""
    stated = spec.quantization_config
    if stated is None and options.quantization is None:
        return
    if stated is not None and options.quantization not in (None, _method_name(stated)):
        raise _misfit(spec, str(options.quantization))
    method = options.quantization or _method_name(stated or {})
    if method == UNNAMED:
        raise ConfigError(f"{spec.path} has a quantization_config that names no quant_method, so nobody can read it.")
    if method == "gguf":
        raise ConfigError(
            f"{spec.path} says that it is quantized with 'gguf', which is a format of single files: give the .gguf "
            "file itself, with its plugin installed: pip install core-serve-gguf"
        )
    if stated is None and method in FILE_FORMATS:
        raise ConfigError(
            f"--quantization {method} is for checkpoints in that format, and {spec.path} is none. Make one with "
            "`core-serve quantize`, or quantize while it is loaded: --quantization int8."
        )
    short = DISTRIBUTIONS.get(method, method.replace("_", "-"))
    source = "--quantization asks for" if options.quantization else f"{spec.path} is quantized with"
    raise ConfigError(
        f"{source} {method!r}, and no installed plugin takes it. {_whose(method)}: pip install core-serve-quant-{short}"
    )


def _whose(method: str) -> str:
    """Only our own names are known to be ours; anybody may call a package after a method."""
    known = method in FILE_FORMATS or method in DISTRIBUTIONS
    return "Install one" if known else OF_OTHERS


def _method_name(stated: Mapping[str, Any]) -> str:
    name = stated.get("quant_method")
    if isinstance(name, str):
        return name
    return "bitsandbytes" if stated.get("load_in_4bit") or stated.get("load_in_8bit") else UNNAMED


MAKERS = {"int4": "compressed-tensors", "int8": "compressed-tensors", "bnb-nf4": "bnb", "bnb-int8": "bnb"}


def nobody_quantizes(method: str) -> str:
    """Return what to say where no plugin makes checkpoints by a method."""
    short = MAKERS.get(method, method.replace("_", "-"))
    return f"No installed plugin quantizes with {method!r}. Install one: pip install core-serve-quant-{short}"
