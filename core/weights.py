"""Checkpoints of Hugging Face's layout: a folder's config and its tensors as a stream; the strict way into a model.

Tensors are read one at a time, each into memory of its own. A shard that is missing, cut short or at odds with the
index is an error that names file and tensor, before the first tensor is handed out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from core.errors import CheckpointError
from core.json_files import read_json
from core.safetensors_file import SafetensorsFile, first_cut_tensor
from core.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from core.contracts import Checkpoint

CONFIG = "config.json"
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MAX_LISTED = 10  # names in one message

TensorFile = tuple[Path, Sequence[str]]  # a file and the tensors that it holds


def is_hf_folder(path: str | Path) -> bool:
    return (Path(path) / CONFIG).is_file()


class HFCheckpoint:
    """A folder with config.json. Opening it reads the two configs only."""

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        if not is_hf_folder(folder):
            raise CheckpointError(describe(str(path)))
        generation = folder / "generation_config.json"
        generation_config = read_json(generation) if generation.is_file() else {}
        folder = folder.absolute()  # so that "." has a name
        self.spec = ModelSpec(folder, "hf", read_json(folder / CONFIG), generation_config)
        self._headers: dict[Path, SafetensorsFile] = {}

    def tensor_names(self) -> Sequence[str]:
        """Return the names of all tensors. Raises CheckpointError if the files do not fit together."""
        return [name for _, names in self._files for name in names]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every (name, tensor) once, file by file. Raises CheckpointError before the first if a file is amiss."""
        for file, names in self._files:
            tensors = self._opened(file)
            for name in names:
                yield name, tensors(name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor. Raises CheckpointError if there is none of this name, or a file is amiss."""
        return self._opened(self.file_of(name))(name)

    def holds_integers(self, name: str) -> bool:
        """True if a tensor's type is one of whole numbers; of files in PyTorch's format that is not looked up."""
        file = self.file_of(name)
        return file.suffix == ".safetensors" and self._opened_safely(file).holds_integers(name)

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor. Raises CheckpointError if none does."""
        if name not in self._owner:
            raise CheckpointError(f"{self.spec.path} has no tensor {name!r}.")
        return self._owner[name]

    @cached_property
    def _owner(self) -> dict[str, Path]:
        return {name: file for file, names in self._files for name in names}

    def _opened(self, file: Path) -> Callable[[str], Tensor]:
        """Return what reads a tensor of a file by its name."""
        if file.suffix != ".safetensors":
            return _open_pickle(file).__getitem__  # mapped: not to be kept
        return self._opened_safely(file).tensor

    def _opened_safely(self, file: Path) -> SafetensorsFile:
        if file not in self._headers:
            self._headers[file] = SafetensorsFile(file)
        return self._headers[file]

    @cached_property
    def _files(self) -> list[TensorFile]:
        shards, weight_map = _shards(self.spec.path)
        files: list[TensorFile] = [(shard, _names_in(shard)) for shard in shards]
        _check_doubles(files)
        _check_index(files, weight_map)
        return files


# ------------------------------------------------------------------------------------------------ files


def _shards(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """Return the files that hold tensors, and the index's tensor -> file name (empty without an index)."""
    for single, index in ((SAFETENSORS, SAFETENSORS_INDEX), (PICKLE, PICKLE_INDEX)):
        if (folder / index).is_file():
            weight_map = _weight_map(folder / index)
            shards = [folder / name for name in sorted(set(weight_map.values()))]
            _check_present(shards, folder / index)
            return shards, weight_map
        if (folder / single).is_file():
            return [folder / single], {}
    here = _listed(sorted(entry.name for entry in folder.iterdir()))
    raise CheckpointError(
        f"{folder} holds no weights: neither {SAFETENSORS} nor {SAFETENSORS_INDEX}, and no {PICKLE}. It holds: {here}."
    )


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index} has no weight_map, so nothing says which file holds which tensor.")
    for tensor, file in found.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} says that tensor {tensor!r} is in {file!r}, which is not a file name.")
    return found


def _check_present(shards: Iterable[Path], index: Path) -> None:
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names files that are not there: {_listed(missing)}. The download is not complete; repeat it."
        )


def _names_in(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return list(_open_pickle(file))
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:  # numpy: names need no torch
            return list(opened.offset_keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is cut short or damaged: {error}. Its size is {file.stat().st_size:,} bytes{_cut_at(file)}. "
            "Download it again."
        ) from error


def _cut_at(file: Path) -> str:
    """Return which tensor a file ends in, as a part of a sentence; nothing where its header does not say."""
    name = first_cut_tensor(file)
    return "" if name is None else f", and it ends before tensor {name!r} does"


def _check_doubles(files: Iterable[TensorFile]) -> None:
    owner: dict[str, Path] = {}
    for file, names in files:
        for name in names:
            if name in owner:
                raise CheckpointError(f"Tensor {name!r} is in two files: {owner[name]} and {file.name}. Remove one.")
            owner[name] = file


def _check_index(files: Iterable[TensorFile], weight_map: Mapping[str, str]) -> None:
    # Tensors that a shard holds and the index does not name are kept: whoever loads them says if they are left over.
    held = {file.name: (file, set(names)) for file, names in files}
    for name, file_name in weight_map.items():
        file, names = held[file_name]
        if name not in names:
            raise CheckpointError(
                f"The index says that tensor {name!r} is in {file}, but it is not. Download it again."
            )


def _open_pickle(file: Path) -> dict[str, Tensor]:
    """Map a PyTorch file, without running any code in it."""
    import torch

    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read safely: {_first_line(error)} Convert the checkpoint to safetensors."
        ) from error
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise CheckpointError(f"{file} holds more than tensors by name. Convert the checkpoint to safetensors.")
    return held


# ------------------------------------------------------------------------------------------------ into a model


def load_strict(
    params: Mapping[str, Callable[[Tensor], None]],
    tensors: Iterable[tuple[str, Tensor]],
    ignore: Callable[[str], bool] = lambda name: False,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Hand every tensor to the loader of its name; `ignore` says which left-over names are fine.

    Raises CheckpointError naming the tensor that does not fit and the checkpoint's file that holds it, or, at the end,
    all that are missing or left over.
    """
    done: set[str] = set()
    left_over: list[str] = []
    for name, tensor in tensors:
        if name in done:
            raise CheckpointError(f"Tensor {name!r} comes twice in the checkpoint.")
        if name in params:
            _load_one(name, params[name], tensor, checkpoint)
            done.add(name)
        elif not ignore(name):
            left_over.append(name)
    missing = [name for name in params if name not in done]
    if missing or left_over:
        raise CheckpointError(_misfit(missing, left_over))


def _load_one(name: str, loader: Callable[[Tensor], None], tensor: Tensor, checkpoint: Checkpoint | None) -> None:
    try:
        loader(tensor)
    except CheckpointError as error:
        if name not in str(error):
            error.add_note(f"while loading tensor {name!r}")
        where = files_of(checkpoint, [name]) if checkpoint is not None else ""
        if where:
            raise CheckpointError(f"{str(error).removesuffix('.')}{where}.") from error
        raise
    except RuntimeError as error:  # what torch raises for shapes that do not fit
        where = files_of(checkpoint, [name]) if checkpoint is not None else ""
        raise CheckpointError(
            f"Tensor {name!r} {list(tensor.shape)} does not fit{where}: {_first_line(error)}"
        ) from error


def files_of(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """Return " (FILE, ...)": what holds tensors of the same modules as `names`; "" for a checkpoint of no such files.

    A quantized weight has another name in the file, but its module's is the same.
    """
    file_of = getattr(checkpoint, "file_of", None)
    if file_of is None:
        return ""
    modules = {name.rpartition(".")[0] for name in names}
    held = {file_of(name).name for name in checkpoint.tensor_names() if name.rpartition(".")[0] in modules}
    return f" ({', '.join(sorted(held)[:3])})" if held else ""


def _misfit(missing: Sequence[str], left_over: Sequence[str]) -> str:
    parts = ["The checkpoint does not fit the model."]
    if missing:
        parts.append(f"Missing tensors ({len(missing)}): {_listed(missing)}.")
    if left_over:
        parts.append(f"Left over ({len(left_over)}): {_listed(left_over)}.")
    return " ".join([*parts, "Try --model-impl transformers, or check that all its files belong together."])


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) or "nothing") + more


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


# ------------------------------------------------------------------------------------------------ where a model is

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # "org/name", or "gpt2"


def find_locally(path: str) -> Path | None:
    """Return the folder or file that `path` is, or the local cache's copy of the model of that name, or None."""
    here = Path(path).expanduser()
    if here.exists():
        return here
    return _in_cache(path) if HUB_NAME.fullmatch(path) else None


def _in_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def not_found(path: str) -> str:
    """Return what to tell somebody whose model is nowhere on this machine."""
    if not path:
        return "The model's path is empty. Give --model-path a folder or a file."
    if HUB_NAME.fullmatch(path):
        return (
            f"There is no file or folder {path!r}, and no model of that name in the local Hugging Face cache. "
            f"core-serve downloads nothing by itself: run `hf download {path}` first, or give the path of a folder or "
            "a file."
        )
    return (
        f"There is no file or folder {path!r}. Give --model-path a folder with config.json, or a file such as a .gguf."
    )


def describe(path: str) -> str:
    """Return why an existing path is no checkpoint that anybody knows."""
    where = Path(path).expanduser()
    if where.is_dir():
        here = _listed(sorted(entry.name for entry in where.iterdir()))
        return f"No plugin opens the folder {path}: it has no {CONFIG}. It holds: {here}."
    if where.is_file():
        kind = f"files of type {where.suffix!r}" if where.suffix else "files without a suffix"
        more = "need pip install core-serve-gguf" if where.suffix == ".gguf" else "may need one more plugin"
        return f"No plugin opens the file {path}; {kind} {more} (see `core-serve plugins`)."
    return f"{path} is neither a folder nor a file." if where.exists() else not_found(path)
