"""COCO folders as samples: `load("coco:/data/coco/val2017", n=100)`.

Nothing is downloaded. Sets of one's own are read where exporters differ (ids as text, say), and refused with a sentence
where nobody could say what is meant.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image

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

    Crowds are among the annotations, marked `iscrowd`, but are no labels. Boxes without area and captions without text
    are left out, with a warning. Captions come from `captions_*.json` beside the instances.

    Args:
        folder: the pictures (`/data/coco/val2017`, with `/data/coco/annotations/instances_val2017.json`, or `images/`
            with `annotations/instances.json`), or the folder above, if it holds one set of pictures.
        seed: different seeds draw different pictures, possibly some in common.
        last: the last `n` in this order, or all there are: other pictures than the first, as far as the folder goes.

    Raises:
        EmbedLensError: a folder or file is missing or not COCO's format, an entry cannot be understood, a category is
            unknown, or there are fewer than `n` pictures. `picture` says what raises on first use.
    """
    from embedlens.samples import Sample

    if seed < 0:
        raise EmbedLensError(f"seed is {seed}: use 0 or more")
    pictures, file = _layout(folder)
    content = _read(file, ("images", "annotations", "categories"))
    images, categories = (_by_id(content, *part, file) for part in (("images", "picture"), ("categories", "category")))
    names = {id: _text(cat, "name", f"category {id} of {file}", "write a word") for id, cat in categories.items()}
    instances = _by_picture(content, images, file)
    for entry in (entry for entries in instances.values() for entry in entries):
        if _whole(entry.get("category_id")) not in names:
            raise EmbedLensError(
                f"annotation {entry['id']} of {file} has category {entry.get('category_id')!r}, which the file does "
                "not list: add it to 'categories', or take the annotation out"
            )
    ids = sorted(images)
    if n > len(ids) and not last:
        raise EmbedLensError(f"n is {n}, but {file} lists {len(ids)} pictures: ask for at most as many")
    random.Random(seed).shuffle(ids)
    spoken = file.with_name(file.name.replace("instances", "captions", 1))
    captions = _by_picture(_read(spoken, ("images", "annotations")), images, spoken) if spoken.is_file() else {}
    samples: list[Sample] = []
    flat = mute = 0
    for id in ids[-n:] if last else ids[:n]:
        entries = [_entry(entry, file) for entry in instances.get(id, ())]
        with_area = tuple(entry for entry in entries if entry["bbox"][2] > 0 and entry["bbox"][3] > 0)
        said = [entry.get("caption") for entry in captions.get(id, ())]
        texts = tuple(text.strip() for text in said if isinstance(text, str) and text.strip())
        flat, mute = flat + len(entries) - len(with_area), mute + len(said) - len(texts)
        what = f"picture {id} of {file}"
        width, height = (_number(images[id], side, what, least=1) for side in ("width", "height"))
        fix = f"save the picture in {pictures}, and write its file's name, such as '7.jpg'"
        draw = partial(picture, pictures / _text(images[id], "file_name", what, fix), width, height)
        samples.append(Sample(id, width, height, with_area, texts, (), names, draw))
    if flat:
        warnings.warn(f"{flat} boxes without area were left out of {n} pictures of {file.name}", stacklevel=3)
    if mute:
        warnings.warn(f"{mute} captions without text were left out of {n} pictures of {spoken.name}", stacklevel=3)
    return samples


def comparable(samples: Iterable[Sample]) -> list[Sample]:
    """The samples with objects of those labels alone that the words of every tokenizer can name (all but UNCOMMON). So
    that shares of labels found mean the same for LLaVA and for Qwen. Sets of one's own keep their other labels."""
    found = []
    for sample in samples:
        names = {id: name for id, name in sample.category_names.items() if name not in UNCOMMON}
        kept = tuple(entry for entry in sample.annotations if entry["category_id"] in names)
        found.append(replace(sample, annotations=kept, category_names=names))
    return found


def picture(path: Path, width: int, height: int) -> Image.Image:
    """The picture of a sample, RGB, as stored, whatever turn its EXIF asks for: annotations are about those pixels.

    Only where its annotations are for the size that it has upright is it turned. EmbedLensError: it is missing or
    damaged, or has another size than its annotations were made on.
    """
    if not os.path.exists(path):
        what = f"no picture {path.name} in {path.parent}, though the annotations list it"
        raise EmbedLensError(f"{what}: put it there, or take it out of them{_source(path)}")
    image = None
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged EXIF; the picture itself is fine
        with Image.open(path) as file:
            file.getexif()[ExifTags.Base.Orientation] = 1
            image = open_picture(file)
    if image is None or image.size != (width, height):
        image = open_picture(path)  # upright; or it says why it cannot be read
    if image.size != (width, height):
        raise EmbedLensError(
            f"{path} is {image.width}x{image.height} but its annotations are for {width}x{height}, so boxes would lie "
            "elsewhere: use the picture as it came with the annotations (not resized or turned)"
        )
    return image


def _layout(folder: str | Path) -> tuple[Path, Path]:
    """Folder of the pictures and file of the instances."""
    if not str(folder).strip():
        raise EmbedLensError("no folder after coco: - pass, for example, coco:/data/coco/val2017")
    given = Path(folder).expanduser()
    if not given.is_dir():
        what = f"no folder {given}: pass the one that holds annotations/ and a folder of pictures"
        raise EmbedLensError(f"{what}, or the pictures' own{_source(given)}")
    if not (given / "annotations").is_dir():
        return given, _instances_of(given)
    files = sorted((given / "annotations").glob("instances*.json"))
    found = [(pictures, file) for file in files if (pictures := given / _pictures_of(file)).is_dir()]
    if len(found) > 1:
        names = " or ".join(f"coco:{pictures}" for pictures, _ in found)
        raise EmbedLensError(f"{given} holds several sets of pictures: pass {names}")
    if not found:
        sets = [(file.name, _pictures_of(file)) for file in files] or [("instances_NAME.json", "NAME")]
        wanted = " or ".join(f"annotations/{name} with its pictures in {pictures}/" for name, pictures in sets)
        raise EmbedLensError(f"no {wanted} under {given}: name them so{_source(*files)}")
    return found[0]


def _instances_of(pictures: Path) -> Path:
    """The instances that belong to a folder of pictures, in the folder beside it."""
    beside, name = pictures.absolute().parent / "annotations", pictures.absolute().name
    for file in (f"instances_{name}.json", *(["instances.json"] if name == "images" else [])):
        if (beside / file).is_file():
            return beside / file
    raise EmbedLensError(f"no annotations/instances_{name}.json beside {pictures}: put it there{_source(pictures)}")


def _pictures_of(file: Path) -> str:
    return file.stem.removeprefix("instances").removeprefix("_") or "images"


def _source(*paths: Path) -> str:
    """Where a set is to be had, if it is one of COCO's own."""
    own = re.search(r"(train|val|test)20\d\d", " ".join(map(str, paths)))
    return f"; get {own[0]}.zip and its annotations from {DOWNLOAD} into one folder" if own else ""


def _read(file: Path, parts: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
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
        yield (f"{part}[{place}]" if entry.get("id") is None else f"{kind} {entry['id']}") + f" of {file}", entry


def _by_id(content: Mapping[str, Any], part: str, kind: str, file: Path) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for what, entry in _entries(content, part, kind, file):
        id = _number(entry, "id", what)
        if found.setdefault(id, entry) != entry:
            raise EmbedLensError(f"{file} has two of {kind} {id}, which differ: give each an id of its own")
    return found


def _by_picture(
    content: Mapping[str, Any], images: Mapping[int, Any], file: Path
) -> Mapping[int, list[dict[str, Any]]]:
    """The annotations of each picture, in the file's order."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for place, (what, entry) in enumerate(_entries(content, "annotations", "annotation", file)):
        found[_number(entry, "image_id", what)].append({"id": place, **entry})
    if images and found and not images.keys() & found.keys():
        why = f"no annotation of {file} is of a picture that is listed: their image_id is {min(found)} and so on"
        raise EmbedLensError(f"{why}, the pictures' id {min(images)} and so on; make them agree")
    return found


def _entry(entry: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """An annotation as it is in the file, with the fields that everything here relies on, as numbers."""
    what = f"annotation {entry['id']} of {file}"
    box = _value(entry, "bbox", what)
    if not isinstance(box, list) or [isinstance(x, (int, float)) and abs(x) < math.inf for x in box] != [True] * 4:
        raise EmbedLensError(f"{what} has the box {box!r}: write [x, y, width, height] in px")
    crowd = entry.get("iscrowd") or 0
    crowd = int(crowd) if isinstance(crowd, bool) else _whole(crowd)
    if crowd not in (0, 1):
        raise EmbedLensError(f"{what} has the iscrowd {entry['iscrowd']!r}: write 0 or 1")
    return {**entry, "iscrowd": crowd} | {name: _whole(entry[name]) for name in ("image_id", "category_id")}


def _text(entry: Mapping[str, Any], key: str, what: str, fix: str) -> str:
    """A name, of a category or of a file here; a number is written out."""
    value = _value(entry, key, what)
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not text.strip() or "://" in text:
        raise EmbedLensError(f"{what} has the {key} {value!r}: {fix}")
    return text


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
