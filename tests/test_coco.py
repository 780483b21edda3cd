"""COCO folders: what was written is read back, pictures open late, and whatever is wrong with a folder is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from embedlens import EmbedLensError, samples
from embedlens.samples import Sample, coco
from embedlens.samples.miniworld.sprites import CATEGORIES


def write_coco(pictures: list[Sample], folder: Path) -> None:
    """Pictures and `annotations/instances.json`, `annotations/captions.json` that pycocotools loads."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    images, boxes, captions = [], [], []
    for item in pictures:
        name = f"{item.id:012d}.png"
        item.image.save(folder / "images" / name)
        images.append({"id": item.id, "file_name": name, "width": item.width, "height": item.height})
        boxes += map(dict, item.annotations)
        texts = enumerate(item.captions)
        captions += [{"id": item.id * 100 + n, "image_id": item.id, "caption": text} for n, text in texts]
    categories = [{"id": c.id, "name": c.name, "supercategory": c.group} for c in CATEGORIES]
    about = {"info": {"description": "miniature world"}, "licenses": [], "images": images}
    for name, entries in (("instances", boxes), ("captions", captions)):
        content = {**about, "annotations": entries} | ({"categories": categories} if name == "instances" else {})
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Six pictures of the miniature world and the folder they were written to. Read only."""
    folder = tmp_path_factory.mktemp("coco")
    pictures = samples.load("miniworld", n=6)
    write_coco(pictures, folder)
    return pictures, folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it with COCO's own names."""
    shutil.copytree(written[1] / "images", tmp_path / "val2017")
    (tmp_path / "annotations").mkdir()
    for name in ("instances", "captions"):
        shutil.copy(written[1] / "annotations" / f"{name}.json", tmp_path / "annotations" / f"{name}_val2017.json")
    return tmp_path


def rewrite(folder: Path, change, name: str = "instances") -> None:
    file = folder / "annotations" / f"{name}_val2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def key(sample):
    return sample.id


def test_what_was_written_is_read_back(written, capsys):
    pictures, folder = written
    read = sorted(samples.load(f"coco:{folder}", n=6), key=key)
    for sample, original in zip(read, pictures, strict=True):
        assert (sample.id, sample.width, sample.height) == (original.id, original.width, original.height)
        assert sample.annotations == original.annotations and sample.captions == original.captions
        assert sample.category_names == original.category_names and sample.labels == original.labels
        np.testing.assert_array_equal(np.asarray(sample.image), np.asarray(original.image))
    assert any(sample.annotations for sample in read) and read[0].annotations != read[1].annotations
    assert capsys.readouterr() == ("", "")  # pycocotools prints
    instances = COCO(str(folder / "annotations" / "instances.json"))
    for entry in instances.loadAnns(instances.getAnnIds()):
        assert instances.annToMask(entry).sum() == entry["area"] > 0


def test_groups_are_found_in_other_photographs_of_the_folder(written, tiny):
    from embedlens.groups import discover, reference_of

    dataset = f"coco:{written[1]}"
    measured, others = samples.load(dataset, n=4, seed=1), samples.calibration(dataset, n=2, seed=1)
    assert not {sample.id for sample in measured} & {sample.id for sample in others}
    every = samples.calibration(dataset, n=64, seed=1)  # as many as there are
    assert len(every) == 6 and {sample.id for sample in [*measured, *others]} == {sample.id for sample in every}
    found = reference_of(tiny, dataset, 1)
    assert found == discover(tiny, every) and found.n_pictures == 6
    assert reference_of(tiny, dataset, 1) is found


def test_pictures_to_compare_models_on_have_only_labels_that_every_vocabulary_has(written):
    pictures, _ = written
    names = dict(enumerate(["dog", "bicycle", "hot dog", "gadget"]))
    entries = tuple({"category_id": id, "bbox": [0, 0, 9, 9], "iscrowd": 0} for id in names)
    (found,) = coco.comparable([replace(pictures[0], category_names=names, annotations=entries)])
    assert found.labels == ("dog", "gadget") and [entry["category_id"] for entry in found.annotations] == [0, 3]
    assert list(found.category_names.values()) == ["dog", "gadget"]
    assert {"bicycle", "hot dog", "fire hydrant"} <= coco.UNCOMMON and len(coco.UNCOMMON) == 80 - 38


def test_every_way_to_name_a_folder_finds_it(written, folder, monkeypatch):
    images = [sample.id for sample in samples.load(f"coco:{written[1] / 'images'}", n=6)]
    assert images == [sample.id for sample in samples.load(f"coco:{written[1]}", n=6)]
    monkeypatch.chdir(folder)
    for name in (f"coco:{folder / 'val2017'}", f"coco:{folder}", str(folder), "coco:val2017", "coco:.", "."):
        read = samples.load(name, n=6)
        assert [sample.id for sample in read] == images and read[0].image.mode == "RGB"
        assert read[0].captions  # of the same split
    monkeypatch.chdir("val2017")
    assert [sample.id for sample in samples.load("coco:.", n=6)] == images


def test_the_seed_draws_the_pictures_and_fewer_are_the_first_of_more(folder):
    def ids(n, seed):
        return [sample.id for sample in samples.load(f"coco:{folder}", n=n, seed=seed)]

    assert ids(6, 0)[:3] == ids(3, 0) and sorted(ids(6, 0)) == list(range(6))
    assert len({tuple(ids(6, seed)) for seed in range(5)}) == 5


def test_crowds_stay_but_are_no_labels(folder):
    def crowd(content):
        for entry in content["annotations"]:
            if entry["image_id"] == 0:
                entry["iscrowd"] = 1
        content["annotations"] += [{**content["annotations"][0], "id": 9999, "image_id": 1, "iscrowd": 1}]

    before = {sample.id: sample for sample in samples.load(f"coco:{folder}", n=6)}
    rewrite(folder, crowd)
    after = {sample.id: sample for sample in samples.load(f"coco:{folder}", n=6)}
    assert len(after[0].annotations) == len(before[0].annotations) > 0
    assert after[0].labels == () and before[0].labels
    assert len(after[1].annotations) == len(before[1].annotations) + 1 and after[1].labels == before[1].labels


def test_boxes_without_area_and_captions_without_text_are_left_out_and_counted(folder):
    def flatten(content):
        content["annotations"][0]["bbox"][2] = 0
        content["annotations"][1]["bbox"][3] = 0.0

    def silence(content):
        content["annotations"][0]["caption"] = None
        content["annotations"][1].pop("caption")

    def counts():
        read = samples.load(f"coco:{folder}", n=6)
        return sum(len(sample.annotations) for sample in read), sum(len(sample.captions) for sample in read)

    boxes, captions = counts()
    rewrite(folder, flatten)
    with pytest.warns(UserWarning, match="2 boxes without area were left out of 6 pictures of instances_val2017.json"):
        assert counts() == (boxes - 2, captions)
    rewrite(folder, silence, "captions")
    with pytest.warns(UserWarning, match="2 captions without text were left out of 6 pictures of captions_val2017"):
        assert counts() == (boxes - 2, captions - 2)


def exported(content):
    """As exporters write it that differ in what they take for a number."""
    for at, image in enumerate(content["images"]):
        image.update(
            id=str(image["id"]) if at % 2 else float(image["id"]),
            width=f"{image['width']}",
            height=float(image["height"]),
        )
    for at, entry in enumerate(content["annotations"]):
        entry["image_id"] = str(entry["image_id"]) if at % 3 else entry["image_id"]
        entry["category_id"] = str(entry["category_id"]) if at % 2 else entry["category_id"]
        entry["iscrowd"] = ("0", None, False)[at % 3]
    for category in content["categories"]:
        category["id"] = f" {category['id']}"


def test_numbers_as_text_are_the_same_numbers(folder):
    before = samples.load(f"coco:{folder}", n=6)
    rewrite(folder, exported)
    rewrite(folder, lambda c: [entry.update(image_id=str(entry["image_id"])) for entry in c["annotations"]], "captions")
    after = samples.load(f"coco:{folder}", n=6)
    assert after == before and any(sample.labels for sample in after) and all(sample.captions for sample in after)
    assert after[0].image.size == (after[0].width, after[0].height)
    rewrite(folder, lambda content: [entry.pop("iscrowd") for entry in content["annotations"]])
    rewrite(folder, lambda content: [category.update(name=int(category["id"])) for category in content["categories"]])
    (plain,) = samples.load(f"coco:{folder}", n=1)
    assert all(entry["iscrowd"] == 0 for entry in plain.annotations)  # as plain exporters leave it out
    assert plain.category_names == {i: str(i) for i in plain.category_names}  # a category named by a number


def first(**change):
    return lambda content: content["annotations"][0].update(change)


def each(**change):
    return lambda content: [image.update(change) for image in content["images"]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c["images"].pop(), "n is 6, but .* lists 5 pictures"),
        (lambda c: c["annotations"][0].pop("bbox"), r"annotation \d+ of .* has no 'bbox'"),
        (lambda c: c["categories"][0].pop("name"), "category .* has no 'name'"),
        (lambda c: c["categories"][0].update(name=None), r"category \d+ of .* has the name None: write a word"),
        (lambda c: c["images"][0].update(id="a7"), r"picture a7 of .* has the id 'a7': write a whole number"),
        (lambda c: c["images"][1].update(id="0"), "has two of picture 0, which differ: give each an id of its own"),
        (lambda c: c["images"].insert(0, None), r"images\[0\] of .* is None, no picture: take it out"),
        (lambda c: c["annotations"].insert(0, [1]), r"annotations\[0\] of .* is \[1\], no annotation"),
        (first(image_id=[1]), r"annotation \d+ of .* has the image_id \[1\]: write a whole number"),
        (first(category_id=999), "has category 999, which the file does not list: add it to 'categories'"),
        (first(bbox=[1, 2]), r"has the box \[1, 2\]: write \[x, y, width, height\]"),
        (first(iscrowd="no"), "has the iscrowd 'no': write 0 or 1"),
        (each(width=None), r"picture \d of .* has the width None: write a whole"),
        (each(width=96.5), "has the width 96.5: write a whole number"),
        (each(file_name="https://x.org/1.jpg"), "'https://x.org/1.jpg': save the picture in .*, and write its file's"),
        (
            lambda c: [e.update(image_id=e["image_id"] + 1000) for e in c["annotations"]],
            r"no annotation of .* is of a picture that is listed: their image_id is 100\d and so on, the",
        ),
    ],
)
def test_an_entry_that_says_nothing_gets_a_sentence_with_file_entry_and_fix(folder, change, sentence):
    (folder / "val2017").rename(folder / "own")
    file = folder / "annotations" / "instances_own.json"
    (folder / "annotations" / "instances_val2017.json").rename(file)
    samples.load(f"coco:{folder}", n=6)  # it was usable
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(EmbedLensError, match=sentence) as refused:
        samples.load(f"coco:{folder}", n=6)
    assert "instances_own.json" in str(refused.value) and "cocodataset" not in str(refused.value)


def test_a_folder_that_cannot_be_used_says_what_is_missing_and_where_it_is(folder):
    instances = folder / "annotations" / "instances_val2017.json"
    shutil.rmtree(folder / "val2017")
    (folder / "val2017").mkdir()
    sample = samples.load(f"coco:{folder}", n=1)[0]  # pictures are opened on first use
    with pytest.raises(EmbedLensError, match=r"no picture 0+\d.png in .*val2017.*https://cocodataset.org/#download"):
        sample.image  # noqa: B018

    def refused(sentence, **request):
        with pytest.raises(EmbedLensError, match=sentence):
            samples.load(**{"dataset": f"coco:{folder / 'val2017'}", "n": 1} | request)

    refused("split='train' is of the miniature world: leave it out", split="train")
    refused("textured is of the miniature world", textured=1.0)
    refused("seed is -1", seed=-1)
    refused("at least one", n=0)
    (folder / "annotations" / "captions_val2017.json").write_text("{")
    refused("captions_val2017.json cannot be")
    instances.write_text("[1,")
    refused("instances_val2017.json cannot be read as JSON .*: get it again")
    instances.write_text("[]")
    refused("has no list 'images'")
    shutil.rmtree(folder / "annotations")
    refused("no annotations/instances_val2017.json beside .*val2017: put it there; get val2017.zip")
    shutil.rmtree(folder / "val2017")
    refused("no folder .*val2017: pass the one that holds annotations/")
    refused("no folder after coco:", dataset="coco:")


def test_the_owner_of_another_set_is_not_sent_to_cocos(folder):
    (folder / "val2017").rename(folder / "own")
    for case in (folder / "own", folder / "none", folder):
        with pytest.raises(EmbedLensError) as refused:
            samples.load(f"coco:{case}", n=6)
        assert ("cocodataset" in str(refused.value)) == (case == folder)  # its file is named as COCO's
    (folder / "annotations" / "instances_val2017.json").rename(folder / "annotations" / "instances_own.json")
    sample = samples.load(f"coco:{folder}", n=1)[0]
    shutil.rmtree(folder / "own")
    with pytest.raises(
        EmbedLensError, match="no picture .*own, though the annotations list it: put it there, or take"
    ) as no:
        sample.image  # noqa: B018
    assert "cocodataset" not in str(no.value)


@pytest.mark.parametrize("orientation, suffix", zip(range(1, 9), ["jpg", "png", "tiff"] * 3, strict=False))
def test_boxes_are_on_stored_pixels_whatever_turn_exif_asks_for(folder, orientation, suffix):
    """A red box at one place of a stored picture, which viewers would turn."""
    x, y, w, h = 8, 40, 24, 16
    drawn = Image.new("RGB", (96, 64), "blue")
    drawn.paste("red", (x, y, x + w, y + h))
    exif = Image.Exif()
    exif[0x0112] = orientation
    drawn.save(folder / "val2017" / f"turned.{suffix}", exif=exif, **({"quality": 95} if suffix == "jpg" else {}))

    def only(content):
        content["images"] = [{"id": 0, "file_name": f"turned.{suffix}", "width": 96, "height": 64}]
        content["annotations"] = [{**content["annotations"][0], "image_id": 0, "bbox": [x, y, w, h]}]

    rewrite(folder, only)
    (sample,) = samples.load(f"coco:{folder}", n=1)
    assert sample.image.size == (96, 64)
    red = np.asarray(sample.image)[..., 0] > 128
    inside = np.zeros_like(red)
    inside[y : y + h, x : x + w] = True
    assert (red == inside).mean() > 0.98

    if orientation > 4:  # where only the upright picture has the size that is annotated, it is meant
        rewrite(folder, lambda content: content["images"][0].update(width=64, height=96))
        assert samples.load(f"coco:{folder}", n=1)[0].image.size == (64, 96)
    rewrite(folder, lambda content: content["images"][0].update(width=50, height=50))
    with pytest.raises(EmbedLensError, match="boxes would lie elsewhere"):
        samples.load(f"coco:{folder}", n=1)[0].image  # noqa: B018


def test_the_folder_above_must_leave_no_choice(folder):
    shutil.copytree(folder / "val2017", folder / "train2017")
    instances = folder / "annotations" / "instances_val2017.json"
    shutil.copy(instances, folder / "annotations" / "instances_train2017.json")
    with pytest.raises(EmbedLensError, match="several sets of pictures: pass coco:.*train2017 or coco:.*val2017"):
        samples.load(f"coco:{folder}", n=1)
    shutil.rmtree(folder / "train2017")
    samples.load(f"coco:{folder}", n=1)
    shutil.rmtree(folder / "val2017")
    with pytest.raises(
        EmbedLensError, match="no .* or annotations/instances_val2017.json with its pictures in val2017/"
    ):
        samples.load(f"coco:{folder}", n=1)


def test_a_missing_picture_ends_no_reading_and_is_named_once(folder, tiny):
    """What `run` does for studies, for what reads its pictures itself: calibration, partners."""
    from embedlens.groups import discover
    from embedlens.measures import anatomy

    files = sorted((folder / "val2017").iterdir())
    whole = sorted(samples.load(f"coco:{folder}", n=6), key=key)
    files[1].unlink()
    files[4].write_bytes(files[4].read_bytes()[:200])

    def remaining():
        return sorted(samples.load(f"coco:{folder}", n=6), key=key)

    one = "2 of 6 pictures cannot be read and are left out; the first is sample 1: no picture"
    with pytest.warns(UserWarning, match=one) as warned:
        assert [sample.id for sample in samples.readable(remaining())] == [0, 2, 3, 5]
    assert len(warned) == 1
    with pytest.warns(UserWarning, match=one), pytest.warns(UserWarning, match="1 of 3 pictures cannot be read"):
        study = anatomy.study_of(tiny, remaining(), [whole[0], *remaining()[1:2], whole[2]])
    assert len(study.keywords["partners"]) == 2 and study.keywords["reference"].n_pictures == 4
    for file in (folder / "val2017").iterdir():
        file.unlink()
    with pytest.raises(EmbedLensError, match="none of 6 pictures can be read; the first is sample 0: no picture"):
        discover(tiny, remaining())
