"""COCO folders as samples: `load("coco:/data/coco/val2017", n=100)`.

Nothing is downloaded. COCO's own pictures and annotations are to be had from https://cocodataset.org/#download; sets of
one's own are read where exporters differ (ids as text, say), and refused with a sentence where nobody could say what is
meant.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from embedlens.errors import EmbedLensError
from embedlens.pictures import open_picture

if TYPE_CHECKING:
    from embedlens.samples import Sample

DOWNLOAD = "https://cocodataset.org/#download"
#: COCO's labels without an entry of their own in LLaMA's vocabulary, the smallest of the models named here (by the rule
#: head-word of `embedlens.measures.labels`): whoever reads words of tokens cannot find them there, in others they can.
UNCOMMON = frozenset(
    "bicycle motorcycle airplane truck bench elephant zebra giraffe backpack umbrella handbag suitcase frisbee skis "
    "snowboard kite skateboard surfboard bottle knife spoon banana sandwich broccoli carrot pizza donut cake couch "
    "toilet microwave oven toaster refrigerator vase scissors toothbrush".split()
) | {"fire hydrant", "baseball glove", "tennis racket", "hot dog", "hair drier"}


def load(folder: str | Path, n: int, seed: int = 0, last: bool = False) -> list[Sample]:
    """`n` pictures of a COCO folder, drawn and ordered by `seed`; the first of many are the few.

    Annotations are COCO's own. Crowds are among them, marked `iscrowd`, but are no labels. Boxes without area and
    captions without text are left out, with a warning that counts them. Captions come along where `captions_*.json`
    lies beside the instances. Pictures are opened on first use.

    Annotations of this kind are about pixels as they are stored, so a picture is read as stored, whatever turn its EXIF
    asks for; only where its annotations are for the size that it has upright is it turned.

    Args:
        folder: the pictures (`/data/coco/val2017`, with `/data/coco/annotations/instances_val2017.json`), or the
            folder above, if it holds `annotations/` and one set of pictures; `images/` with
            `annotations/instances.json` is understood too.
        n: how many pictures.
        seed: different seeds draw different pictures, possibly some in common.
        last: the last `n` in this order, or all there are: other pictures than the first, as far as the folder goes.

    Raises:
        EmbedLensError: a folder or file is missing or not COCO's format, an entry cannot be understood, a category is
            unknown, or there are fewer than `n` pictures. A picture that is missing, damaged or of another size raises
            on first use.
    """
    from embedlens.samples import Sample

    if seed < 0:
        raise EmbedLensError(f"seed is {seed}: use 0 or more")
    pictures, annotations = _layout(folder)
    content = _read(annotations, ("images", "annotations", "categories"))
    images = _by_id(content, "images", "picture", annotations)
    categories = _by_id(content, "categories", "category", annotations)
    category_names = {id: _name(cat, f"category {id} of {annotations}") for id, cat in categories.items()}
    instances = _by_picture(content, images, annotations)
    _check_categories(instances, category_names, annotations)
    ids = sorted(images)
    if n > len(ids) and not last:
        raise EmbedLensError(f"n is {n}, but {annotations} lists {len(ids)} pictures: ask for at most as many")
    random.Random(seed).shuffle(ids)
    spoken = annotations.with_name(annotations.name.replace("instances", "captions", 1))
    captions: Mapping[int, list[dict[str, Any]]] = {}
    if spoken.is_file():
        captions = _by_picture(_read(spoken, ("images", "annotations")), images, spoken)
    samples: list[Sample] = []
    flat = mute = 0
    for id in ids[-n:] if last else ids[:n]:
        entries = [_entry(entry, annotations) for entry in instances.get(id, ())]
        with_area = tuple(entry for entry in entries if entry["bbox"][2] > 0 and entry["bbox"][3] > 0)
        flat += len(entries) - len(with_area)
        said = [entry.get("caption") for entry in captions.get(id, ())]
        texts = tuple(text.strip() for text in said if isinstance(text, str) and text.strip())
        mute += len(said) - len(texts)
        what = f"picture {id} of {annotations}"
        width, height = (_number(images[id], side, what, least=1) for side in ("width", "height"))
        samples.append(
            Sample(
                id=id,
                width=width,
                height=height,
                annotations=with_area,
                captions=texts,
                questions=(),
                category_names=category_names,
                draw=partial(picture, pictures / _file_name(images[id], what, pictures), width, height),
            )
        )
    if flat:
        warnings.warn(f"{flat} boxes without area were left out of {n} pictures of {annotations.name}", stacklevel=3)
    if mute:
        warnings.warn(f"{mute} captions without text were left out of {n} pictures of {spoken.name}", stacklevel=3)
    return samples


def comparable(samples: Iterable[Sample]) -> list[Sample]:
    """The samples with objects of those labels alone that the words of every tokenizer can name (all but UNCOMMON).

    So that shares of labels found mean the same for LLaVA and for Qwen. Sets of one's own keep their other labels.
    """
    found = []
    for sample in samples:
        names = {id: name for id, name in sample.category_names.items() if name not in UNCOMMON}
        kept = tuple(entry for entry in sample.annotations if entry["category_id"] in names)
        found.append(replace(sample, annotations=kept, category_names=names))
    return found


def picture(path: Path, width: int, height: int) -> Image:
    """The picture of a sample, RGB: as stored, or upright if only so it has the size of its annotations.

    Raises:
        EmbedLensError: it is missing or damaged, or has another size than its annotations were made on.
    """
    if not os.path.exists(path):
        raise EmbedLensError(
            f"no picture {path.name} in {path.parent}, though the annotations list it: put it there, or take it out of "
            f"them{_source(path)}"
        )
    image = _as_stored(path)
    if image is None or image.size != (width, height):
        image = open_picture(path)
    if image.size != (width, height):
        raise EmbedLensError(
            f"{path} is {image.width}x{image.height} but its annotations are for {width}x{height}, so boxes would lie "
            "elsewhere: use the picture as it came with the annotations (not resized or turned)"
        )
    return image


def _as_stored(path: Path) -> Image | None:
    """Without the turn that its EXIF asks for; None if it cannot be read, and `open_picture` says why."""
    from PIL import ExifTags, Image

    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF; the picture itself is fine
        with Image.open(path) as file:
            file.getexif()[ExifTags.Base.Orientation] = 1
            return open_picture(file)
    return None


# --- which folder, which file ----------------------------------------------------------------------------------------


def _layout(folder: str | Path) -> tuple[Path, Path]:
    """Folder of the pictures and file of the instances."""
    if not str(folder).strip():
        raise EmbedLensError("no folder after coco: - pass, for example, coco:/data/coco/val2017")
    given = Path(folder).expanduser()
    if not given.is_dir():
        raise EmbedLensError(
            f"no folder {given}: pass the one that holds annotations/ and a folder of pictures, or the pictures' own"
            f"{_source(given)}"
        )
    if not (given / "annotations").is_dir():
        return given, _instances_of(given)
    files = sorted((given / "annotations").glob("instances*.json"))
    found = [(pictures, file) for file in files if (pictures := given / _pictures_of(file)).is_dir()]
    if len(found) > 1:
        names = " or ".join(f"coco:{pictures}" for pictures, _ in found)
        raise EmbedLensError(f"{given} holds several sets of pictures: pass {names}")
    if not found:
        wanted = " or ".join(f"annotations/{file.name} with its pictures in {_pictures_of(file)}/" for file in files)
        wanted = wanted or "annotations/instances_NAME.json with its pictures in NAME/"
        raise EmbedLensError(f"no {wanted} under {given}: name them so{_source(*files)}")
    return found[0]


def _instances_of(pictures: Path) -> Path:
    """The instances that belong to a folder of pictures, in the folder beside it."""
    beside = pictures.absolute().parent / "annotations"
    name = pictures.absolute().name
    for file in (beside / f"instances_{name}.json", beside / "instances.json"):
        if file.is_file() and (file.stem != "instances" or name == "images"):
            return file
    raise EmbedLensError(f"no annotations/instances_{name}.json beside {pictures}: put it there{_source(pictures)}")


def _pictures_of(file: Path) -> str:
    return file.stem.removeprefix("instances").removeprefix("_") or "images"


def _source(*paths: Path) -> str:
    """Where a set is to be had, if it is one of COCO's own."""
    own = re.search(r"(train|val|test)20\d\d", " ".join(map(str, paths)))
    return f"; get {own[0]}.zip and its annotations from {DOWNLOAD} into one folder" if own else ""


# --- what is in a file -----------------------------------------------------------------------------------------------


def _read(file: Path, parts: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        with file.open(encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError, RecursionError) as error:
        raise EmbedLensError(f"{file} cannot be read as JSON ({error}): get it again{_source(file)}") from None
    absent = [part for part in parts if not (isinstance(content, Mapping) and isinstance(content.get(part), list))]
    if absent:
        raise EmbedLensError(f"{file} has no list {absent[0]!r}, as COCO files have: get it again{_source(file)}")
    return content


def _entries(content: Mapping[str, Any], part: str, kind: str, file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(what to call it in a sentence, entry)."""
    for place, entry in enumerate(content[part]):
        if not isinstance(entry, Mapping):
            raise EmbedLensError(f"{part}[{place}] of {file} is {entry!r}, no {kind}: take it out")
        yield f"{kind} {entry['id']}" if entry.get("id") is not None else f"{part}[{place}]", entry


def _by_id(content: Mapping[str, Any], part: str, kind: str, file: Path) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for what, entry in _entries(content, part, kind, file):
        id = _number(entry, "id", f"{what} of {file}")
        if found.setdefault(id, entry) != entry:
            raise EmbedLensError(f"{file} has two of {kind} {id}, which differ: give each an id of its own")
    return found


def _by_picture(
    content: Mapping[str, Any], images: Mapping[int, Any], file: Path
) -> Mapping[int, list[dict[str, Any]]]:
    """The annotations of each picture, in the file's order, by pycocotools, which wants its ids as numbers."""
    from pycocotools.coco import COCO

    entries = [
        {**entry, "image_id": _number(entry, "image_id", f"{what} of {file}"), "id": entry.get("id", place)}
        for place, (what, entry) in enumerate(_entries(content, "annotations", "annotation", file))
    ]
    index = COCO()
    index.dataset = {"annotations": entries}
    with redirect_stdout(StringIO()):  # it reports its progress
        index.createIndex()
    found = index.imgToAnns
    if images and found and not images.keys() & found.keys():
        raise EmbedLensError(
            f"no annotation of {file} is of a picture that is listed: their image_id is {min(found)} and so on, the "
            f"pictures' id {min(images)} and so on; make them agree"
        )
    return found


def _check_categories(
    instances: Mapping[int, list[dict[str, Any]]], category_names: Mapping[int, str], file: Path
) -> None:
    for entry in (entry for entries in instances.values() for entry in entries):
        if _whole(entry.get("category_id")) not in category_names:
            raise EmbedLensError(
                f"annotation {entry.get('id')} of {file} has category {entry.get('category_id')!r}, which the file "
                "does not list: add it to 'categories', or take the annotation out"
            )


def _entry(entry: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """An annotation as it is in the file, with the fields that everything here relies on, as numbers."""
    what = f"annotation {entry.get('id')} of {file}"
    box = _value(entry, "bbox", what)
    if not isinstance(box, list) or [isinstance(x, (int, float)) and abs(x) < math.inf for x in box] != [True] * 4:
        raise EmbedLensError(f"{what} has the box {box!r}: write [x, y, width, height] in px")
    crowd = entry.get("iscrowd") or 0
    crowd = int(crowd) if isinstance(crowd, bool) else _whole(crowd)
    if crowd not in (0, 1):
        raise EmbedLensError(f"{what} has the iscrowd {entry['iscrowd']!r}: write 0 or 1")
    return {
        **entry,
        "image_id": _whole(entry["image_id"]),
        "category_id": _whole(entry["category_id"]),
        "iscrowd": crowd,
    }


def _name(category: Mapping[str, Any], what: str) -> str:
    name = _value(category, "name", what)
    name = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    if not isinstance(name, str) or not name.strip():
        raise EmbedLensError(f"{what} has the name {name!r}: write a word")
    return name


def _file_name(image: Mapping[str, Any], what: str, pictures: Path) -> str:
    name = _value(image, "file_name", what)
    if not isinstance(name, str) or not name.strip() or "://" in name:
        raise EmbedLensError(
            f"{what} has the file_name {name!r}: save the picture in {pictures}, and write its file's name, such as "
            "'7.jpg'"
        )
    return name


def _value(entry: Mapping[str, Any], key: str, what: str) -> Any:
    if key not in entry:
        raise EmbedLensError(f"{what} has no {key!r}: add it, as COCO's format has it")
    return entry[key]


def _number(entry: Mapping[str, Any], key: str, what: str, least: float = -math.inf) -> int:
    number = _whole(_value(entry, key, what))
    if number is None or number < least:
        raise EmbedLensError(f"{what} has the {key} {entry[key]!r}: write a whole number{' above 0' * (least == 1)}")
    return number


def _whole(value: Any) -> int | None:
    """The whole number that is written, as text too; None if there is none.

    >>> _whole("07"), _whole(7.0), _whole(7.5), _whole("seven"), _whole(None), _whole(True)
    (7, 7, None, None, None, None)
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, bool) or not (isinstance(value, str) or number == value) else number
