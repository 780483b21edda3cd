"""A card that is not there: tensors that say they are on it refuse to meet those on the CPU, and batches run out of it.

What a real card refuses, this one does: operations that mix its tensors with CPU ones of one dimension or more, NumPy's
hands on them, indices on the wrong side, a generator of the other side. Its numbers are computed on the CPU, so that
they are those of a run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from embedlens.vlm import VisionLanguageModel

CARD = torch.device("cuda", 0)
CPU = torch.device("cpu")
#: They bring tensors of one side to the other, or read numbers from them.
CROSSING = {
    Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_, Tensor.tolist, Tensor.item, Tensor.__repr__, Tensor.__format__,
    Tensor.type_as, Tensor.data_ptr, Tensor.untyped_storage, Tensor.is_set_to, Tensor.element_size, Tensor.new_tensor,
    torch.as_tensor, torch.tensor, torch._has_compatible_shallow_copy_type,
}  # fmt: skip
INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
NUMPY = {Tensor.numpy, Tensor.__array__}


class OnCard(Tensor):
    """A tensor that says it is on the card."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    is_cpu = False  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # `PretendCard` does it all


def _is_card(value: Any) -> bool:
    return isinstance(value, OnCard)


def _off(value: Any) -> Any:
    return value.as_subclass(Tensor) if _is_card(value) else value


def _on(value: Any) -> Any:
    return value.as_subclass(OnCard) if isinstance(value, Tensor) and not _is_card(value) else value


def _each(do: Callable[[Any], Any], value: Any) -> Any:
    """What `do` makes of each part of what a function takes or gives, in its place; PyTorch's trees take ten times as
    long. A size has no parts."""
    if not isinstance(value, (tuple, list, dict)) or isinstance(value, torch.Size):
        return do(value)
    if isinstance(value, dict):
        return {key: _each(do, part) for key, part in value.items()} if value else value
    return type(value)([_each(do, part) if isinstance(part, (tuple, list, dict)) else do(part) for part in value])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for part in value for tensor in _tensors(part)]


def _is_cards(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class PretendCard(TorchFunctionMode):
    """While it is active, "cuda" is a device that exists, and its tensors mix with no others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", str(func))) == "__get__":  # an attribute, such as a shape
            found = func(*args)
            on = _is_card(args[0])
            return CARD if on and isinstance(found, torch.device) else _on(found) if on else found
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        here = any(map(_is_card, given))
        named = [value for value in [kwargs.get("device"), *args] if isinstance(value, (str, torch.device))]
        if func in (Tensor.to, torch.as_tensor, torch.tensor) or "device" in kwargs:
            wanted = next((value for value in named if not isinstance(value, str) or _names_device(value)), None)
            like = next((value for value in args[1:] if isinstance(value, Tensor)), None) if func is Tensor.to else None
            there = _is_cards(wanted) if wanted is not None else _is_card(like) if like is not None else here
        elif func is Tensor.cuda:
            there = True
        elif func is Tensor.cpu or func in (Tensor.tolist, Tensor.item):
            there = False
        elif func in INDEXING or func in (Tensor.copy_, Tensor.new_tensor):
            there = _is_card(args[0])
        elif func is Tensor.type_as:
            there = _is_card(args[1])
        else:
            there = here
        if func in NUMPY and here:
            raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu() first")
        if func in INDEXING:
            _check_indices(args)
        elif func not in CROSSING and name != "__set__":
            _check_sides(name, given if here else [], kwargs.get("generator"), there)
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], "cpu")
        args, kwargs = _each(_plain, (args, kwargs))
        return _each(_on if there else _off, func(*args, **kwargs))


def _names_device(word: str) -> bool:
    return word.split(":")[0] in ("cpu", "cuda", "meta", "mps")


def _plain(value: Any) -> Any:
    """What the CPU computes with in place of it."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return "cpu"
    return _off(value)


def _check_sides(name: str, given: list[Tensor], generator: torch.Generator | None, there: bool) -> None:
    if any(not _is_card(value) and value.ndim for value in given):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
        )
    if there and isinstance(generator, torch.Generator) and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu' ({name})")


def _check_indices(args: Any) -> None:
    indices = _tensors(args[1])
    if not _is_card(args[0]) and any(map(_is_card, indices)):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    value = args[2] if len(args) > 2 else None  # a slice takes a copy from the other side, chosen places do not
    if indices and isinstance(value, Tensor) and value.ndim and _is_card(value) != _is_card(args[0]):
        raise RuntimeError("Expected all tensors to be on the same device (__setitem__)")


@contextmanager
def on_card(model: VisionLanguageModel) -> Iterator[VisionLanguageModel]:
    """A block in which a model is on the card; its wrapper is made, and checks itself, there."""
    kept = []
    with torch.no_grad():
        for part in model.hf.modules():
            for held in (part._parameters, part._buffers):
                for name, value in list(held.items()):
                    if value is not None:
                        kept.append((held, name, value))
                        moved = value.detach().as_subclass(OnCard)
                        with PretendCard():
                            held[name] = torch.nn.Parameter(moved, False) if held is part._parameters else moved
    try:
        with PretendCard():
            yield model.with_preprocessing(model.preprocessing)
    finally:
        for held, name, value in kept:
            held[name] = value


@contextmanager
def small_card(rows: int, model: VisionLanguageModel) -> Iterator[list[int]]:
    """A block in which so many prompts, or pictures, fit into the model at a time; gives how many were asked for.

    Families that cut pictures send them through the tower one by one, so that only the decoder's batches count.
    """
    asked: list[int] = []

    def weigh(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        asked.append(len(_tensors([*args, kwargs.get("inputs_embeds"), kwargs.get("pixel_values")])[0]))
        if asked[-1] > rows:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {asked[-1]} rows, {rows} fit.")

    weighed = ("decoder",) if "own" in model.family.PREPROCESSINGS else ("vision_tower", "decoder")
    parts = [model.hf.get_submodule(model.family.MODULES[part]) for part in weighed]
    hooks = [part.register_forward_pre_hook(weigh, with_kwargs=True) for part in parts]
    try:
        with patch("embedlens.batches.release"):  # there is nothing to give back
            yield asked
    finally:
        for hook in hooks:
            hook.remove()
