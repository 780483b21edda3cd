"""From a name to a model: where a checkpoint lies, which weights and processor it has, where they are put."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from embedlens import processes
from embedlens.errors import EmbedLensError
from embedlens.model_names import MINIATURE, signed
from embedlens.vlm import VisionLanguageModel, family_named, preprocessing_of

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel
else:  # transformers takes seconds to import and is not needed before a model is loaded
    BitsAndBytesConfig = PreTrainedModel = object

AUTO = "auto"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    name_or_folder: str | Path = MINIATURE,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    preprocessing: str | None = None,
) -> VisionLanguageModel:
    """A model to study: the shipped miniature, a checkpoint folder, or a Hugging Face repository.

    Args:
        name_or_folder: `"miniature"`, a folder that `save_pretrained` wrote, or an id as `llava-hf/llava-1.5-7b-hf`.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, or `"auto"`, all GPUs; by default the first GPU, else the CPU.
        dtype: `"float32"`, `"float16"` or `"bfloat16"`. Default, `"auto"`: float32 for the miniature and on the CPU,
            the checkpoint's own on a GPU. Any other becomes part of the model's name.
        quantize: `"4bit"` or `"8bit"` matrices of the decoder through bitsandbytes (needs a CUDA GPU).
        preprocessing: how LLaVA-1.5 makes a picture a square: `"letterbox"`, the default; `"centre-crop"`, as the stock
            processor of llava-hf; `"stretch"`. Other families cut in their `"own"` way, of one of these if it is named.

    Raises:
        EmbedLensError: unknown name, class, device, dtype, quantisation or preprocessing, or a part that is missing.
    """
    with warnings.catch_warnings():  # in a notebook without ipywidgets its first import prints a path of this machine
        warnings.simplefilter("ignore")
        import_module("tqdm.auto")
    place = _device(processes.placed(device))
    if processes.own_device() is not None:
        processes.processes("cpu" if place == "cpu" else "cuda")  # before anything else looks for devices
    whole = place == "cpu" or name_or_folder == MINIATURE
    asked = None if dtype in (None, AUTO) else dtype_of(dtype)
    check_quantization(quantize, place)
    source = _locate(name_or_folder)
    name = str(name_or_folder)
    config = _config(source, name)
    stored = _stored_dtype(config)
    family = family_named((config.get("architectures") or ["model of unnamed class"])[0], name)
    preprocessing_of(preprocessing, family)
    usual = torch.float32 if whole else stored
    quantization = _quantization(quantize, family, asked or usual)
    hf = _load_weights(source, name, place, asked or (usual if whole else AUTO), quantization)
    other = str(asked).removeprefix("torch.") if asked not in (None, usual, stored) else None
    return VisionLanguageModel(hf, _load_processor(source, name, family), signed(name, quantize, other), preprocessing)


def _device(device: str | torch.device | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == AUTO:
        return AUTO
    known = "pass 'cpu', 'cuda', 'cuda:1', 'mps' or 'auto'"
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise EmbedLensError(f"unknown device {device!r}: {known}") from None
    if wanted.type not in ("cpu", "cuda", "mps"):
        raise EmbedLensError(f"unsupported device {device!r}: {known}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    seen = gpus if wanted.type == "cuda" else int(torch.backends.mps.is_available())
    if wanted.type != "cpu" and (wanted.index or 0) >= seen:
        raise EmbedLensError(
            f"device {device!r} is asked for, but PyTorch sees {seen or 'no'} {wanted.type.upper()} GPU: pass "
            f"device={f'{wanted.type}:0' if seen else 'cpu'!r}"
        )
    return str(wanted)


def dtype_of(dtype: Any) -> torch.dtype:
    """Of a name, or of itself; EmbedLensError for another than the three of `DTYPES`."""
    known = DTYPES.get(dtype, dtype)
    if known not in DTYPES.values():
        raise EmbedLensError(f"unknown dtype {dtype!r}: pass one of {', '.join(map(repr, DTYPES))}")
    return known


def check_quantization(quantize: str | None, place: str) -> None:
    """Refuse what this machine cannot do, before anything is loaded; nothing, for no quantisation. EmbedLensError:
    another word than "4bit" or "8bit", no CUDA GPU, a package that is missing."""
    if quantize is None:
        return
    if quantize not in ("4bit", "8bit"):
        raise EmbedLensError(f"unknown quantize {quantize!r}: pass '4bit' or '8bit', or leave it out")
    if not torch.cuda.is_available():
        raise EmbedLensError(f"quantize={quantize!r} needs a CUDA GPU, and PyTorch sees none: leave it out")
    if not place.startswith(("cuda", "auto")):
        raise EmbedLensError(f"quantize={quantize!r} needs a CUDA GPU, not {place}: pass device='cuda', or no quantize")
    if find_spec("bitsandbytes") is None:
        raise EmbedLensError(f"quantize={quantize!r} needs bitsandbytes: pip install bitsandbytes")


def unpacked(family: ModuleType) -> list[str]:
    """Modules that quantisation leaves alone: what makes visual tokens, and the head that lenses read with."""
    return [family.MODULES[role] for role in ("vision_tower", "projector", "head")]


def _quantization(quantize: str | None, family: ModuleType, computed: torch.dtype) -> BitsAndBytesConfig | None:
    if quantize is None:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
        llm_int8_skip_modules=unpacked(family),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=computed,  # a model of bfloat16 overflows in float16
    )


def _locate(name_or_folder: str | Path) -> Path | str:
    """The checkpoint's folder, or a repository id."""
    if name_or_folder == MINIATURE:
        folder = Path(str(files("embedlens").joinpath(MINIATURE)))
        if not (folder / "config.json").is_file():
            raise EmbedLensError(f"the miniature is missing from {folder}: reinstall it, or run make train")
        return folder
    text, folder = str(name_or_folder), Path(name_or_folder).expanduser()
    if text and folder.is_dir():
        return folder
    if text.count("/") == 1 and not text.startswith(("/", ".", "~")) and not text.endswith("/") and not folder.exists():
        return text
    raise EmbedLensError(
        f"no folder {text!r}: pass 'miniature', the folder that holds config.json and the weights, or a Hugging Face "
        "repository id such as llava-hf/llava-1.5-7b-hf"
    )


def _config(source: Path | str, name: str) -> dict[str, Any]:
    """What config.json says."""
    from transformers import PreTrainedConfig

    try:
        config, why = PreTrainedConfig.get_config_dict(str(source))[0], "it says nothing"
    except (OSError, ValueError) as error:
        config, why = None, _first_line(error)
    if isinstance(config, dict) and config:
        return config
    raise EmbedLensError(
        f"no config.json of {name!r} that can be read: check the spelling and the connection, or pass the folder that "
        f"model.save_pretrained wrote ({why})"
    )


def _stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Of the weights as published; bfloat16, which does not overflow, where the config does not say."""
    said = [part.get(key) for part in (config, config.get("text_config") or {}) for key in ("dtype", "torch_dtype")]
    return next((DTYPES[dtype] for dtype in said if dtype in DTYPES), torch.bfloat16)


def _load_weights(
    source: Path | str, name: str, place: str, dtype: torch.dtype | str, quantization: BitsAndBytesConfig | None
) -> PreTrainedModel:
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText

    # Straight to the GPU: the weights then never lie in main memory as a whole.
    device_map = place if place.startswith((AUTO, "cuda")) else None
    try:
        with _quiet(isinstance(source, Path)):
            hf, found = AutoModelForImageTextToText.from_pretrained(
                source, dtype=dtype, device_map=device_map, quantization_config=quantization, output_loading_info=True
            )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise EmbedLensError(
            f"the weights of {name} cannot be loaded: save or download the model again ({_first_line(error)})"
        ) from error
    absent = sorted(found["missing_keys"])
    if absent:
        # transformers would go on with random numbers in their place
        raise EmbedLensError(f"weights of {name} lack {len(absent)} tensors ({absent[0]}, ...): save the whole model")
    return hf.to(place) if device_map is None else hf


def _load_processor(source: Path | str, name: str, family: ModuleType) -> Any:
    import transformers

    try:
        own = getattr(family, "PROCESSOR", None)
        loader = transformers.AutoProcessor if own is None else _without_video(getattr(transformers, own))
        # Pillow resizes the same everywhere; torchvision, where installed, would give other pixels.
        processor = loader.from_pretrained(source, backend="pil")
    except Exception as error:  # the ways in which parts of a processor can be missing or damaged have no common class
        raise EmbedLensError(
            f"{name} has no usable processor: add the files that processor.save_pretrained writes "
            f"(processor_config.json, tokenizer.json, ...) ({_first_line(error)})"
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise EmbedLensError(f"{name} has no image processor: add processor_config.json, as save_pretrained writes it")
    return processor


def _without_video(processor: type) -> Any:
    """A stock processor's class that does not ask for its video half, which needs torchvision."""

    def get_attributes(cls) -> list[str]:
        return [part for part in processor.get_attributes() if part != "video_processor"]  # type: ignore[attr-defined]

    return type(processor.__name__, (processor,), {"get_attributes": classmethod(get_attributes)})


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """No progress bar while a local folder loads: it takes no time, and notebooks would keep the bar."""
    from transformers.utils import logging

    if not (quiet and logging.is_progress_bar_enabled()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
