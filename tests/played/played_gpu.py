"""A GPU that is played in the host's memory: its tensors say "cuda:0", and operators refuse to mix them with others.

`Played` wraps a tensor of the host. Operators are run on what is wrapped, and the result is wrapped again; one tensor
of the host among them is the RuntimeError that a real GPU raises. Kernels of our own cannot run here, so attention is
the torch reference. Operators that look for a GPU before torch lets anybody intervene are run on what is wrapped, too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from core.device import HostDevice

GPU = torch.device("cuda:0")
MOVES = ("aten::_to_copy", "aten::copy_")
NO_GPU = "not linked with support for cuda"


class Played(Tensor):
    """A tensor on the played GPU."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=GPU
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"Played({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


def inner(x):
    return x.inner if isinstance(x, Played) else x


def wrapped(found, given):
    """Wrap the tensors of a result; one that is an argument itself (an operator in place) stays that argument."""
    known = {id(x.inner): x for x in tree_leaves(given) if isinstance(x, Played)}
    return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else Played(x), found)


def refuse_mixing(name, given):
    if any(isinstance(x, Tensor) and not isinstance(x, Played) and x.dim() > 0 for x in tree_leaves(given)):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, cuda:0")


def run(function, args, kwargs):
    """Run an operator of torch where its arguments are, or where it is asked to."""
    name, given = function._schema.name, (args, kwargs)
    here = any(isinstance(x, Played) for x in tree_leaves(given))
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if asked == "meta":
        return function(*args, **kwargs)
    if here and name not in MOVES and name != "aten::index.Tensor":
        refuse_mixing(name, given)
    kwargs = {**kwargs, "device": torch.device("cpu")} if asked else dict(kwargs)
    kwargs.pop("pin_memory", None)
    if name == "aten::histc":  # a GPU counts integers, too
        args = (inner(args[0]).float(), *args[1:])
    found = function(*tree_map(inner, args), **tree_map(inner, kwargs))
    if name == "aten::copy_":
        return args[0]
    return wrapped(found, given) if asked == "cuda" or (here and asked is None) else found


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Methods(TorchFunctionMode):
    """What torch does before operators are dispatched, and a GPU has its part in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function is Tensor.numpy and isinstance(args[0], Played):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if args and isinstance(args[0], Played) and function in (Tensor.tolist, Tensor.item):
            return function(args[0].inner, *args[1:])
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if NO_GPU not in str(error):
                raise
        return self.run_inside(function, args, kwargs)

    @staticmethod
    def run_inside(function, args, kwargs):
        name = getattr(function, "__name__", str(function))
        indexes = name in ("__getitem__", "__setitem__")
        if name != "copy_":
            refuse_mixing(name, ((args[0], *args[2:]) if indexes else args, kwargs))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return wrapped(function(*tree_map(inner, args), **tree_map(inner, kwargs)), (args, kwargs))


class PlayedDevice(HostDevice):
    """What the engine asks of it."""

    stages = True

    def memory(self):
        return 2**33, 2**33

    def buffer(self, size):
        return torch.empty(size, dtype=torch.uint8, device=GPU)

    def copy(self, source, target):
        target.copy_(source)

    def read(self, x):
        return x.cpu()


@contextmanager
def played_gpu() -> Iterator[None]:
    """Let torch see the GPU, and engines that are built meanwhile talk to it."""

    def module_of(device):
        return PlayedDevice(device) if device.type == "cuda" else HostDevice(device)

    replaced = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.get_device_capability": lambda *_: (7, 0),  # too old for grouped products
        "torch.inference_mode.__enter__": lambda self: None,  # wrapped tensors are none that it knows
        "torch.inference_mode.__exit__": lambda self, *error: None,
        "core.plugins.PluginHost.kernels": lambda *_: None,
        "core.engine_build.device_module": module_of,
        "core.runner.device_module": module_of,
    }
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch(name, value))
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrites)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        for mode in (torch.no_grad(), Methods(), Operators()):
            stack.enter_context(mode)
        yield
