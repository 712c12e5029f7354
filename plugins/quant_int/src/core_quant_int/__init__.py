"""int8 and int4 on the fly: --quantization int8 or int4 makes a float checkpoint small while it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.hookspecs import hookimpl

if TYPE_CHECKING:
    from core.config import EngineConfig
    from core.contracts import QuantMethod
    from core.spec import ModelSpec

CORE_API = (1, 0)


@hookimpl
def provide_quant_method(spec: ModelSpec, options: EngineConfig) -> QuantMethod | None:
    if options.quantization not in ("int8", "int4"):
        return None
    from core_quant_int.method import IntMethod

    return IntMethod(bits=int(options.quantization.removeprefix("int")))
