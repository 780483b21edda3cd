"""Samples as a COCO folder that pycocotools loads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from embedlens.samples import Sample
from embedlens.samples.miniworld.sprites import CATEGORIES


def write_coco(samples: Iterable[Sample], folder: Path) -> None:
    """Write pictures and `annotations/instances.json`, `annotations/captions.json` that pycocotools loads."""
    pictures = folder / "images"
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    pictures.mkdir(exist_ok=True)
    images, boxes, captions = [], [], []
    for item in samples:
        name = f"{item.id:012d}.png"
        item.image.save(pictures / name)
        images.append({"id": item.id, "file_name": name, "width": item.width, "height": item.height})
        boxes += [dict(entry) for entry in item.annotations]
        captions += [
            {"id": item.id * 100 + number, "image_id": item.id, "caption": text}
            for number, text in enumerate(item.captions)
        ]
    categories = [{"id": c.id, "name": c.name, "supercategory": c.group} for c in CATEGORIES]
    about = {"info": {"description": "miniature world"}, "licenses": [], "images": images}
    for name, entries in (("instances", boxes), ("captions", captions)):
        content = {**about, "annotations": entries} | ({"categories": categories} if name == "instances" else {})
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))
