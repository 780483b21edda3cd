"""COCO folders as samples, read with pycocotools: `load("coco:/data/coco/val2017", n=100)`.

Nothing is downloaded. Pictures and annotations are to be had from https://cocodataset.org/#download.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from embedlens.errors import EmbedLensError
from embedlens.pictures import open_picture

if TYPE_CHECKING:
    from pycocotools.coco import COCO

    from embedlens.samples import Sample

SOURCE = "get val2017.zip and annotations_trainval2017.zip from https://cocodataset.org/#download into one folder"


def load(folder: str | Path, n: int, seed: int = 0) -> list[Sample]:
    """`n` pictures of a COCO folder, drawn and ordered by `seed`; the first of many are the few.

    Annotations are COCO's own. Crowds are among them, marked `iscrowd`, but are no labels. Boxes without area are left
    out, with a warning that counts them. Captions come along where `captions_*.json` lies beside the instances.
    Pictures are opened on first use.

    Args:
        folder: the pictures (`/data/coco/val2017`, with `/data/coco/annotations/instances_val2017.json`), or the
            folder above, if it holds `annotations/` and one set of pictures; `images/` with
            `annotations/instances.json` is understood too.
        n: how many pictures.
        seed: different seeds draw different pictures, possibly some in common.

    Raises:
        EmbedLensError: a folder or file is missing or not COCO's format, a category is unknown, or there are fewer
            than `n` pictures. A picture that is missing, damaged or of another size raises on first use.
    """
    from embedlens.samples import Sample

    if seed < 0:
        raise EmbedLensError(f"seed is {seed}: use 0 or more")
    pictures, annotations = _layout(folder)
    instances = _read(annotations, ("images", "annotations", "categories"))
    category_names = {id: _value(cat, "name", f"category {id}", annotations) for id, cat in instances.cats.items()}
    _check_categories(instances, category_names, annotations)
    ids = sorted(instances.getImgIds())
    if n > len(ids):
        raise EmbedLensError(f"n is {n}, but {annotations} lists {len(ids)} pictures: ask for at most as many")
    random.Random(seed).shuffle(ids)
    spoken = annotations.with_name(annotations.name.replace("instances", "captions", 1))
    captions = _read(spoken, ("images", "annotations")) if spoken.is_file() else None
    samples: list[Sample] = []
    flat = 0
    for id in ids[:n]:
        entries = [_entry(entry, annotations) for entry in instances.imgToAnns.get(id, ())]
        with_area = tuple(entry for entry in entries if entry["bbox"][2] > 0 and entry["bbox"][3] > 0)
        flat += len(entries) - len(with_area)
        image = instances.imgs[id]
        name, width, height = (_value(image, key, f"picture {id}", annotations) for key in IMAGE)
        samples.append(
            Sample(
                id=id,
                width=width,
                height=height,
                annotations=with_area,
                captions=tuple(entry["caption"].strip() for entry in captions.imgToAnns.get(id, ()))
                if captions
                else (),
                questions=(),
                category_names=category_names,
                draw=partial(picture, pictures / name, width, height),
            )
        )
    if flat:
        warnings.warn(f"{flat} boxes without area were left out of {n} pictures of {annotations.name}", stacklevel=3)
    return samples


IMAGE = ("file_name", "width", "height")


def picture(path: Path, width: int, height: int) -> Image:
    """The picture of a sample, RGB.

    Raises:
        EmbedLensError: it is missing or damaged, or has another size than its annotations were made on.
    """
    if not path.exists():
        raise EmbedLensError(f"no picture {path.name} in {path.parent}, though the annotations list it: {SOURCE}")
    image = open_picture(path)
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
        raise EmbedLensError(f"no folder {given}: pass the one that holds annotations/ and val2017/; {SOURCE}")
    if not (given / "annotations").is_dir():
        return given, _instances_of(given)
    found = [
        (pictures, file)
        for file in sorted((given / "annotations").glob("instances*.json"))
        if (pictures := given / _pictures_of(file)).is_dir()
    ]
    if len(found) > 1:
        names = " or ".join(f"coco:{pictures}" for pictures, _ in found)
        raise EmbedLensError(f"{given} holds several sets of pictures: pass {names}")
    if not found:
        raise EmbedLensError(
            f"no annotations/instances_val2017.json with its pictures in val2017/ under {given}: {SOURCE}"
        )
    return found[0]


def _instances_of(pictures: Path) -> Path:
    """The instances that belong to a folder of pictures, in the folder beside it."""
    beside = pictures.absolute().parent / "annotations"
    name = pictures.absolute().name
    for file in (beside / f"instances_{name}.json", beside / "instances.json"):
        if file.is_file() and (file.stem != "instances" or name == "images"):
            return file
    raise EmbedLensError(f"no annotations/instances_{name}.json beside {pictures}: {SOURCE}")


def _pictures_of(file: Path) -> str:
    return file.stem.removeprefix("instances").removeprefix("_") or "images"


def _read(file: Path, parts: tuple[str, ...]) -> COCO:
    """The file as pycocotools indexes it, without its prints."""
    from pycocotools.coco import COCO

    try:
        with file.open(encoding="utf-8") as stream:
            content = json.load(stream)
    except (OSError, ValueError) as error:
        raise EmbedLensError(f"{file} cannot be read as JSON ({error}): get it again; {SOURCE}") from None
    absent = [part for part in parts if not (isinstance(content, Mapping) and isinstance(content.get(part), list))]
    if absent:
        raise EmbedLensError(f"{file} has no list {absent[0]!r}, so it is no such COCO file: {SOURCE}")
    api = COCO()
    api.dataset = content
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            api.createIndex()
    except (KeyError, TypeError) as error:
        raise EmbedLensError(f"{file} has an entry without {error}: it is not COCO's format, get it again") from None
    return api


def _check_categories(instances: COCO, category_names: Mapping[int, str], file: Path) -> None:
    for entry in instances.dataset["annotations"]:
        if entry.get("category_id") not in category_names:
            raise EmbedLensError(
                f"annotation {entry.get('id')} of {file} has category {entry.get('category_id')!r}, which the file "
                "does not list: add it to 'categories', or take the annotation out"
            )


def _entry(entry: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """An annotation as it is in the file, with the fields that everything here relies on."""
    what = f"annotation {entry['id']}"
    box = _value(entry, "bbox", what, file)
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)) or not all(
        map(math.isfinite, box)
    ):
        raise EmbedLensError(f"{what} of {file} has the box {box!r}: write [x, y, width, height] in px")
    return {"iscrowd": 0, **entry}


def _value(entry: Mapping[str, Any], key: str, what: str, file: Path) -> Any:
    if key not in entry:
        raise EmbedLensError(f"{what} of {file} has no {key!r}: it is not COCO's format, get the file again")
    return entry[key]
