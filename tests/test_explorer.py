"""Promises of attention maps, words in context and the explorer's page, on a twin of every family."""

from __future__ import annotations

import html
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image
from stock import QUESTION, picture
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText
from twins import BY_FAMILY, TWINS
from typer.testing import CliRunner

import embedlens as el
from embedlens import EmbedLensError, Prune, attention_maps, context, explorer, intervene
from embedlens.__main__ import app
from embedlens.explorer import Explorer, _steps, alone
from embedlens.groups import discover


@contextmanager
def refused(said: str):
    """By one sentence, or in a test run, where annotations are checked, by those."""
    with pytest.raises((EmbedLensError, TypeCheckError)) as error:
        yield
    assert said in str(error.value) or isinstance(error.value, TypeCheckError)


@pytest.fixture(scope="module", params=BY_FAMILY.values(), ids=BY_FAMILY)
def twin(request, twin_of):
    return TWINS[request.param], *twin_of(request.param)


@pytest.fixture(scope="module")
def bank(miniature):
    samples = el.samples.load("miniworld", n=40, seed=7)
    return el.ContextLens.build(miniature, [text for s in samples for text in s.captions], layers=[2, 5], per_word=6)


# --- attention -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_attention_and_rollout_are_the_stock_models_own(twin):
    """Rollout is the product of the rows of all positions, half residual; rows of text alone are something else."""
    _, folder, model = twin
    prompt, ids = model.prompt(picture(), QUESTION), [5, 9, 11]
    found = el.attention(model, prompt, ids)
    assert found.shape[0] == model.n_layers and found.shape[2:] == (4, int(prompt.visual.sum()))
    behind = attention_maps.question_ids(model, prompt)
    assert QUESTION in model.tokenizer.decode(behind) and bool((prompt.ids[-len(behind) :] == behind).all())
    asking = el.attention(model, prompt, ids, question=True)
    assert asking.shape[2] == len(behind) + 3
    assert_close(asking[:, :, -4:], found, atol=1e-6, rtol=1e-5)  # not bit for bit: products of more rows may differ
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    whole = attention_maps.followed_by(model, prompt, torch.tensor(ids))
    kinds = {"input_ids": whole.ids[None], "pixel_values": prompt.pixel_values, **prompt.beside}
    if "image_grid_thw" in prompt.beside:
        kinds["mm_token_type_ids"] = (whole.ids[None] == model.family.image_token_id(model.hf)).long()
    flow, rolled = torch.eye(len(prompt)), attention_maps.rollout(model, prompt)
    for layer, weights in enumerate(stock(**kinds, output_attentions=True).attentions):
        assert_close(asking[layer], weights[0, :, -asking.shape[2] :][..., whole.visual], atol=2e-5, rtol=1e-4)
        own = weights[0].mean(0)[: len(prompt), : len(prompt)]  # what follows changes nothing before it
        flow = (own + torch.eye(len(prompt))) / 2 @ flow
        assert_close(rolled[layer, 0], flow[-1, prompt.visual], atol=2e-5, rtol=1e-4)
    assert_close(flow.sum(-1), torch.ones(len(prompt)), atol=1e-4, rtol=0)
    assert not torch.allclose(rolled[-1, 0], found.mean(1)[:, 0].sum(0) / 2, atol=1e-3)
    assert not torch.allclose(found[:, :, 0], found[:, :, 3], atol=1e-4)  # and the queries do look elsewhere


@pytest.mark.parametrize("read", [el.attention, attention_maps.rollout])
def test_under_prune_it_is_that_of_the_shorter_sequence_and_0_where_removed(miniature, read):
    prompt, mask = miniature.prompt(picture(), QUESTION), torch.arange(64) % 3 == 0
    with intervene(miniature, Prune(mask, positions="renumber")):
        pruned = read(miniature, prompt, "cat")
    assert bool((pruned[..., mask] == 0).all())
    assert_close(pruned[..., ~mask], read(miniature, prompt.without(mask), "cat"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("", "the answer is empty"),
        ([10**6], "pass text, or ids from 0 to"),
        ([[5, 6]], "pass text, or ids from 0 to"),
        ([5] * 2000, "allow fewer"),
    ],
)
def test_an_answer_that_cannot_be_one_is_one_sentence(miniature, answer, said):
    with refused(said):
        el.attention(miniature, miniature.prompt(picture(), QUESTION), answer)


def test_an_answer_as_text_is_read_as_the_tokens_that_were_generated_also_where_text_is_silenced(miniature):
    for sample in el.samples.load("miniworld", n=3, seed=0):
        prompt = miniature.prompt(sample.image, "Describe the image.")
        ids, answer = miniature.answer_ids(prompt), miniature.answer(prompt)
        assert miniature.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer
        assert attention_maps.answer_ids(miniature, prompt, answer).tolist() == ids.tolist()
    with intervene(miniature, el.Silence("attention", rows="text")):  # which silences the prompt, not the answer
        said = miniature.tokenizer.decode(miniature.answer_ids(prompt), skip_special_tokens=True)
        assert said.strip() == miniature.answer(prompt)


def test_a_word_that_follows_the_prompt_has_its_space_in_its_token_and_one_on_a_new_line_has_none(twin):
    _, _, other = twin
    ids = attention_maps.answer_ids(other, other.prompt(picture(), QUESTION), "dog").tolist()
    written = other.tokenizer.convert_ids_to_tokens(ids)[0]
    glued = {"llava_next": "▁", "idefics3": "Ġ"}  # to "[/INST]" or "ASSISTANT:"
    assert written[0] == glued.get(other.family.__name__.rpartition(".")[2], "d")


def test_attention_of_a_bfloat16_model_is_softmaxed_from_exact_products():
    query, key = (torch.randn(1, 2, 40, 64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    query, key = (10 * query).bfloat16(), key.bfloat16()
    exact = (query[:, :, -1:].double() @ key.double().mT / 8).softmax(-1)
    assert_close(attention_maps._weights(query[:, :, -1:], key, None, 1 / 8).double(), exact, atol=1e-5, rtol=1e-4)


# --- words in context ------------------------------------------------------------------------------------------------


def test_the_nearest_words_in_context_are_those_of_a_brute_force_ranking(miniature, bank):
    prompt = miniature.prompt(picture(), QUESTION)
    h = miniature.hidden_states(prompt)[3, prompt.visual]
    unit = torch.nn.functional.normalize
    every = unit(h.float(), dim=-1) @ unit(bank.vectors.float(), dim=-1).T
    scores, rows = bank.topk(h, k=4)
    assert_close(scores, every.gather(1, rows), atol=1e-5, rtol=1e-5)
    assert_close(scores, every.sort(dim=1, descending=True).values[:, :4], atol=1e-5, rtol=1e-5)


def test_a_row_of_the_bank_is_its_word_in_its_sentence(miniature, bank):
    """Run through the stock model by itself, the text of a row ends in that row's vector."""
    for index in (0, 17, len(bank.tokens) - 1):
        text = bank.sentences(bank.vectors[index : index + 1].float(), k=1)[0][0].replace("«", "").replace("»", "")
        ids = [miniature.tokenizer.bos_token_id, *miniature.tokenizer(text, add_special_tokens=False)["input_ids"]]
        with torch.no_grad(), miniature.recording() as layers:
            miniature.decoder(inputs_embeds=miniature.hf.get_input_embeddings()(torch.tensor([ids])), use_cache=False)
        own = layers[int(bank.layer[index])][0, -1]
        assert_close(own, bank.vectors[index].float(), atol=2e-2, rtol=2e-2)
        assert text.endswith(bank.tokens[index])


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        ("a red dog", {}, "one text"),
        ([None], {}, "pass texts"),
        (["a dog"], {"per_word": 0}, "per_word is 0"),
        (["a dog"], {"batch_size": 0}, "batch_size is 0"),
        (["a dog"], {"layers": [1, 2], "most": 1}, "most is 1"),
        (["a dog"], {"layers": [2.5]}, "pass some of 1 to 8"),
        (["!", ""], {}, "hold no word"),
    ],
)
def test_what_no_bank_can_be_built_of_is_one_sentence(miniature, texts, options, said):
    with refused(said):
        el.ContextLens.build(miniature, texts, **options)


def test_a_text_is_read_as_far_as_the_model_has_positions_and_a_layer_once(tiny):
    lens = el.ContextLens.build(tiny, [" ".join(f"w{i}" for i in range(900)), "a dog"], layers=[2, 2])
    assert 100 < len(lens.tokens) < 512 and lens.tokens[-1] == "dog" and set(lens.layer.tolist()) == {2}


def test_a_vector_too_large_for_half_precision_keeps_its_direction(miniature, monkeypatch, tmp_path):
    stock = context._stream
    monkeypatch.setattr(context, "_stream", lambda *given: [1e6 * layer for layer in stock(*given)])
    large = el.ContextLens.build(miniature, ["a red dog"], layers=[3]).save(tmp_path / "large.safetensors")
    monkeypatch.undo()
    bank = el.ContextLens.build(miniature, ["a red dog"], layers=[3])
    kept = el.ContextLens.load(large, miniature).vectors.float()
    assert_close(bank.topk(kept, 1)[0], torch.ones(3, 1), atol=1e-3, rtol=0)


def test_no_word_stands_in_the_bank_twice_for_one_beginning_or_more_often_than_allowed(miniature):
    lens = el.ContextLens.build(miniature, ["a red dog", "a red cat", "a red dog", "red"], layers=[1], per_word=2)
    assert lens.tokens == ["a", "red", "dog", "cat", "red"]
    assert len(el.ContextLens.build(miniature, ["a red dog"] * 3, layers=[1, 2], most=4).tokens) == 4


def test_a_saved_bank_reads_the_same_and_another_models_is_refused(miniature, tiny, tiny_folder, bank, tmp_path):
    again = el.ContextLens.load(bank.save(tmp_path / "bank.safetensors"), miniature)
    h = miniature.input_embeddings[50:60]
    assert torch.equal(again.topk(h)[1], bank.topk(h)[1]) and again.sentences(h) == bank.sentences(h)
    file = el.ContextLens.build(tiny, ["a dog"], layers=[1]).save(tmp_path / "bänk.safetensors")
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")  # a model is known by its weights, wherever it lies
    assert el.ContextLens.load(file, el.load(moved, device="cpu")).tokens == ["a", "dog"]
    (tmp_path / "other.safetensors").write_bytes(b"nonsense")
    for name, sentence in (("bank", "build a bank of it"), ("none", "no bank at"), ("other", "cannot be read")):
        with pytest.raises(EmbedLensError, match=sentence):
            el.ContextLens.load(tmp_path / f"{name}.safetensors", tiny)
    with pytest.raises(EmbedLensError, match="cannot write"):
        bank.save(tmp_path / "missing" / "bank.safetensors")


# --- the page --------------------------------------------------------------------------------------------------------


def test_alone_is_the_prompt_without_the_others(miniature):
    prompt = miniature.prompt(picture(), QUESTION)
    sure, ids = alone(miniature, prompt, k=2)
    others = torch.arange(64) != 20
    expected = miniature.logits(prompt.without(others))[-1].softmax(-1).topk(2)
    assert torch.equal(ids[20], expected.indices)
    assert_close(sure[20], expected.values, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": []}, "no picture to explore"),
        ({"names": ["a", "b"]}, "2 names for 1 pictures"),
        ({"names": "photo.png"}, "pass a list"),
        ({"patch": 64}, "no patch 64"),
        ({"layer": 9}, "no layer 9 in miniature: pass 0 to 8"),
        ({"lenses": {"x": "y"}}, "lenses are"),
        ({"lenses": {"Alone": el.EmbedLens(torch.eye(256), ["a"] * 256)}}, "lenses are"),
        ({"layer": 1.5}, "no layer 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"k": 0}, "k is 0"),
        ({"lenses": {"few": el.EmbedLens(torch.eye(256)[:9], "abcdefghi", exclude=range(6))}}, "pass a smaller k"),
    ],
)
def test_options_that_the_page_cannot_show_are_one_sentence(miniature, options, said):
    with refused(said):
        el.explore(miniature, options.pop("image", picture()), **options)


def test_the_page_is_of_the_model_as_it_is(miniature):
    with intervene(miniature, el.Rescale(0.5)):
        with pytest.raises(EmbedLensError, match="leave the intervene block"):
            el.explore(miniature, picture())
        miniature.answer(miniature.prompt(picture(), QUESTION))


@pytest.mark.parametrize("name", ["__BLOB__.png", "__INDEX__", "p\udcff.png"])
def test_a_name_is_neither_a_place_of_the_frame_nor_in_need_of_an_encoding(name, tmp_path):
    page = replace(made_up(16, 2, 2, 2, 2, 2), model=name)
    assert len(page.save(tmp_path / "x.html").read_bytes()) < len(made_up(16, 2, 2, 2, 2, 2).html) + 200
    page._repr_html_().encode()
    with pytest.raises(EmbedLensError, match="no ending .html or .png"):
        page.save(tmp_path / "page.txt")


def made_up(n: int, layers: int, heads: int, k: int, words: int, answer: int, asking: int = 2) -> Explorer:
    rng, side = np.random.default_rng(0), int(n**0.5)

    def noise(*shape, kind=np.uint8):
        return _steps(torch.from_numpy(rng.random(shape, dtype=np.float32)), kind)

    def lens(name, depth):
        ids = rng.integers(0, words, (depth, n, k)).astype(np.uint32)
        scores = noise(depth, n, k, kind=np.uint16)
        return {"name": name, "about": "", "unit": "score", "ids": ids, "scores": scores}

    scene = {"name": "<script>alert(1)</script>.png", "question": "<b>what</b>?", "answer": "<i>x</i>", "note": ""}
    scene |= {"said": ["<i>"] * answer, "asking": ["<u>"] * asking, "layers": layers, "group": ["alive"] * n}
    scene |= {"why": {"alive": "</script><img src=x onerror=alert(1)>"}, "bars": np.zeros(n, dtype=np.uint8)}
    scene |= {"views": [{"start": 0, "rows": side, "cols": side, "picture": "data:image/png;base64,"}]}
    scene |= {"lenses": [lens("EmbedLens", layers + 1), lens("LogitLens", layers + 1), lens("Alone", 1)]}
    scene |= {"similar": noise(n, n), "heads": noise(layers, heads, 1, n)}
    scene |= {"norm": noise(layers + 1, n, kind=np.uint16), "looks": noise(layers, answer, n, kind=np.uint16)}
    scene |= {name: noise(layers, n, kind=np.uint16) for name in ("relative", "rollout")}
    scene |= {"asks": noise(layers, asking, n) | {"power": 2}}
    vocabulary = ["<b>bold</b>", "שלום", *(f"word{i}" for i in range(words - 2))]
    return Explorer([scene], vocabulary, "</title>", Image.new("RGB", (8, 4)))


def test_a_page_of_576_tokens_and_32_layers_stays_below_3_megabytes():
    """Of noise, which does not compress: what a model gives does."""
    asking = explorer.ASKING_BYTES // (32 * 576)
    assert asking > 20 and len(made_up(576, 32, 32, 3, 20_000, 8, asking).html.encode()) < 3e6


def opened(tab: browser.Tab, page: str, folder, script: str = "", where: str = "") -> tuple[str, list]:
    """(the page after its script and ours, what the browser's console said)."""
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    reader = Reader(tab, file, where)
    reader.sees(
        "(() => { const set = (id, value, kind) => { const e = document.getElementById(id); e.value = value; "
        f"e.dispatchEvent(new Event(kind)) }}; {script} }})()"
    )
    return reader.sees("document.documentElement.outerHTML").partition('id="blob"')[0], noise(tab)


def noise(tab: browser.Tab) -> list:
    kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
    return [event for event in tab.heard if event.get("method") in kinds]


@pytest.fixture(scope="module")
def tab():
    if browser.chromium() is None:
        pytest.skip("no chromium: apt-get install chromium")
    with browser.tab() as opened:
        yield opened


class Reader:
    """Who has a keyboard and no mouse."""

    def __init__(self, tab: browser.Tab, file: Path, where: str = "") -> None:
        self.tab, self.address = tab, file.as_uri()
        tab.open(f"{self.address}#{where}")
        tab.evaluate("new Promise(done => setInterval(() => document.body.dataset.ready && done(), 20))")

    def sees(self, script: str):
        return self.tab.evaluate(script)

    def goes_to(self, selector: str) -> None:
        """By Tab, however often it takes; not by any other way."""
        for _ in range(200):
            if self.sees(f"document.activeElement.matches({selector!r})"):
                return
            self.tab.press("Tab")
        pytest.fail(f"Tab never reaches {selector}")

    def chooses(self, name: str) -> list[str]:
        """Walks through a list from its top; returns what was chosen on the way."""
        self.goes_to(f"#{name}")
        chosen = f"document.getElementById('{name}').value"
        self.tab.press("ArrowUp", self.sees(f"document.getElementById('{name}').length"))
        found = [self.sees(chosen)]
        while self.tab.press("ArrowDown") or self.sees(chosen) != found[-1]:
            found.append(self.sees(chosen))
        return found


def used_by_keyboard(tab: browser.Tab, page: Explorer, folder: Path) -> None:
    reader = Reader(tab, page.save(folder / "page.html"))
    sees, press, scene = reader.sees, tab.press, page.scenes[0]
    title = sees("document.getElementById('title').textContent")
    if len(page.scenes) > 1:
        reader.goes_to("#scenes button:nth-child(2)")
        press("Enter")
        assert sees("document.getElementById('title').textContent") != title
        reader.goes_to("#scenes button:nth-child(1)")
        press(" ")
        assert sees("document.getElementById('title').textContent") == title
    reader.goes_to("#layer")
    press("ArrowRight", 2)
    assert sees("document.getElementById('layername').textContent") == "2"
    colours = reader.chooses("colour")
    assert colours == ["none", "group", "word", "norm", "similarity", "attention", "relative", "rollout"]
    for colour in reversed(colours):
        assert sees("document.getElementById('colour').value") == colour
        told = sees("document.getElementById('legend').textContent")
        assert bool(told) == (colour not in ("none", "word")), colour
        if colour == "attention":
            assert reader.chooses("head") == ["-1", *map(str, range(scene["heads"]["of"].shape[1]))]
            assert "head" in sees("document.getElementById('legend').textContent")
            reader.goes_to("#colour")
        press("ArrowUp")
    if len(scene["views"]) > 1:
        assert reader.chooses("view") == [str(number) for number in range(len(scene["views"]))]
    word = sees("document.querySelector('.c.at span').textContent")
    letters = re.search("[A-Za-z]+|$", word)[0][:3] or "e"
    reader.goes_to("#find")
    for letter in letters:
        press(letter)
    assert sees("document.getElementById('find').value") == letters
    reader.goes_to("#found button")
    found = sees("document.activeElement.textContent")
    press("Enter")
    assert found.startswith(f"layer {sees('document.getElementById(`layer`).value')}:")
    assert sees("document.querySelectorAll('.c.hit').length") > 0
    for row, words in (("asking", scene["asking"]), ("said", scene["said"])):
        reader.goes_to(f"#{row} button:nth-child({len(words)})")
        press("Enter")
        assert sees("document.activeElement.getAttribute('aria-pressed')") == "true"
        assert (words[-1].strip() or "␣") in sees("document.getElementById('legend').textContent")
    reader.goes_to(".c")
    at = "document.activeElement.getAttribute('aria-label').match(/[0-9]+/)[0]"
    press("ArrowLeft", 99), press("ArrowUp", 99), press("Enter")
    pinned = sees(at)
    press("ArrowRight"), press("ArrowDown")
    heads = "[...document.querySelectorAll('h3')].map(x => x.textContent).join(';')"
    assert sees(at) != pinned and f"Pinned patch {pinned} (" in sees(heads) and f";Patch {sees(at)} (" in sees(heads)
    assert f"patch {sees(at)}," in sees("document.getElementById('say').textContent")  # what a screen reader says
    press("Escape")
    assert "Pinned" not in sees(heads)
    for width, dark in ((1400, False), (380, False), (380, True)):
        tab.view(width, dark)
        assert sees("document.documentElement.scrollWidth") <= width
        ground = sees("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall("[0-9]+", ground))) < 380) is dark
    text = sees("document.body.innerText")
    assert not re.search("NaN|undefined|Infinity", text)
    asked = [e["params"]["request"]["url"] for e in tab.heard if e.get("method") == "Network.requestWillBeSent"]
    assert {url.partition("#")[0] for url in asked if not url.startswith("data:")} <= {reader.address}
    assert not noise(tab)


@pytest.fixture(scope="module")
def explored(miniature, bank):
    images = [s.image for s in el.samples.load("miniworld", n=2, seed=0)]
    names = ["<script>alert(1)</script>.png", "שלום.png"]
    reference = discover(miniature, el.samples.load("miniworld", n=4, seed=0))
    lenses = {"ContextLens": bank}
    return el.explore(miniature, images, "Describe the image.", lenses=lenses, names=names, reference=reference)


def test_the_page_of_the_miniature_is_used_by_keyboard_alone(explored, tab, tmp_path):
    used_by_keyboard(tab, explored, tmp_path)


def test_every_family_is_explored_by_keyboard_alone(twin, request, tmp_path):
    facts, _, model = twin
    reference = discover(model, el.samples.load("miniworld", n=4, seed=0))
    page = el.explore(model, picture(facts.sizes[1]), QUESTION, reference=reference)
    scene, n = page.scenes[0], len(model.prompt(picture(facts.sizes[1]), QUESTION).grid)
    assert [lens["name"] for lens in scene["lenses"]] == ["EmbedLens", "LogitLens", "Alone"]
    assert scene["lenses"][0]["ids"].shape[:2] == (model.n_layers + 1, n)
    assert sum(view["rows"] * view["cols"] for view in scene["views"]) == n
    assert page.twin.width > page.twin.height
    if browser.chromium() is not None:
        used_by_keyboard(request.getfixturevalue("tab"), page, tmp_path)


@pytest.mark.parametrize(
    "where", ["scene=abc&layer=-3&patch=1.5", "scene=-1&layer=2.5&colour=toString", "colour=__proto__"]
)
def test_an_address_of_nonsense_opens_the_page_as_it_was_made(where, tab, tmp_path):
    dom, console = opened(tab, replace(made_up(16, 2, 2, 2, 2, 2), start={"layer": 1}).html, tmp_path, where=where)
    assert not console
    assert '<output id="layername">1</output>' in dom and "NaN" not in dom and "undefined" not in dom


def test_what_the_page_shows_is_what_the_library_computes_and_is_called_so(miniature, explored, tab, tmp_path):
    images = [s.image for s in el.samples.load("miniworld", n=1, seed=0)]
    page = replace(explored, start={"patch": 9, "layer": 4})
    assert page.scenes[0]["note"] == ""  # a drawing, as it knows them
    keys = """
      document.querySelectorAll('#asking button')[0].click(); set('head', 1, 'change');
      document.body.dataset.asking = document.getElementById('cards').textContent.match(/attention [^ ]+ %[^)]*/)[0];
      document.querySelectorAll('#said button')[2].click();
    """
    dom, console = opened(tab, page.html, tmp_path, keys)
    text = html.unescape(re.sub("<[^>]*>", "", dom.partition('id="cards"')[2])).replace("\xa0", " ")
    prompt = miniature.prompt(images[0], "Describe the image.")
    ids = miniature.answer_ids(prompt)
    looks = el.attention(miniature, prompt, ids[:2].tolist(), question=True)[3, 1]  # block 4 wrote layer 4
    look, first = looks[-1, 9], looks[0, 9]
    stream = miniature.hidden_states(prompt)[4, prompt.visual][9:10]
    logits, words = el.LogitLens.from_model(miniature).topk(stream, 5)
    told = " ".join(
        f"{miniature.tokens[i]} {x:.2f} " for i, x in zip(words[0].tolist(), logits[0].tolist(), strict=True)
    )
    assert " ".join(told.split()) in " ".join(text.split())
    assert f"norm {float(stream.norm()):.1f}" in text
    word = miniature.tokenizer.decode(ids[2:3]).strip()
    shown = re.search(f"attention ([0-9.]+) % \\(“{word}”, block 4, head 1\\)", text)
    assert abs(float(shown[1]) - 100 * float(look)) < 0.2  # one byte a number, finer for small ones
    asked = miniature.tokenizer.decode(attention_maps.question_ids(miniature, prompt)[:1]).strip()
    told = re.search('data-asking="attention ([0-9.]+) %[^"]*“([^"]*)”, block 4, head 1"', html.unescape(dom))
    assert abs(float(told[1]) - 100 * float(first)) < 0.2 and told[2] == (asked or "␣")
    assert "logit" in text and "cosine" in text and "probability" in text
    assert not console


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])  # views side by side, one view that is wide
def test_another_picture_or_view_does_not_keep_what_was_told_of_the_first(family, twin_of, tab, tmp_path):
    _, model = twin_of(BY_FAMILY[family])
    reference = discover(model, el.samples.load("miniworld", n=4, seed=0))
    page = el.explore(model, [picture((200, 90)), picture((60, 200))], QUESTION, reference=reference, patch=1)
    keys = """
      const grid = document.querySelector('.grid');
      document.body.dataset.wide = grid.clientWidth > 1.5 * grid.clientHeight;
      const views = document.getElementById('view').length; set('view', views - 1, 'change');
      document.body.dataset.heads = [...document.querySelectorAll('h3')].map(x => x.textContent).join(';');
      set('find', 'a', 'input'); const before = document.getElementById('found').textContent;
      document.querySelectorAll('#said button')[1].click();
      document.querySelectorAll('#scenes button')[1].click();
      const now = document.getElementById('found').textContent; set('find', 'a', 'input');
      document.body.dataset.found = now === document.getElementById('found').textContent;
      const tokens = [...document.querySelectorAll('#said button')];
      document.body.dataset.pressed = tokens.findIndex(b => b.getAttribute('aria-pressed') === 'true');
    """
    dom, console = opened(tab, page.html, tmp_path, keys)
    assert not console
    assert 'data-found="true"' in dom and 'data-pressed="0"' in dom
    assert "row -" not in dom and "column -" not in dom
    views = page.scenes[0]["views"]
    if len(views) == 1:
        assert f'data-wide="{str(views[0]["cols"] > 1.5 * views[0]["rows"]).lower()}"' in dom


def test_markup_is_text_and_the_head_of_an_answer_token_that_has_only_the_mean_is_not_anothers(tab, tmp_path):
    keys = """
      const head = document.getElementById('head');
      document.querySelectorAll('#said button')[0].click(); head.value = 1; head.dispatchEvent(new Event('change'));
      document.body.dataset.first = head.disabled + document.getElementById('legend').textContent;
      document.querySelectorAll('#said button')[1].click();
      document.body.dataset.second = head.disabled + document.getElementById('legend').textContent;
    """
    dom, console = opened(tab, made_up(16, 2, 2, 2, 2, 2).html, tmp_path, keys)
    assert not console
    assert "&lt;b&gt;bold&lt;/b&gt;" in dom and "<b>bold" not in dom  # markup in words and names is text
    assert "<img src=x" not in dom and "<script>alert" not in dom
    assert "שלום" in dom and "&lt;script&gt;alert(1)&lt;/script&gt;.png" in dom
    assert re.search('data-first="false[^"]*head 1', dom) and re.search('data-second="true[^"]*mean of heads', dom)


def test_long_names_fold_and_a_move_repaints_two_cells_of_a_large_picture(tab, tmp_path):
    page = made_up(576, 2, 2, 2, 9, 1)
    scene = page.scenes[0] | {"name": "a" * 300, "question": "q" * 300, "answer": "b" * 300, "said": ["c" * 300]}
    keys = """
      document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
      const own = document.querySelectorAll('.c');
      const seen = new MutationObserver(() => 0);
      seen.observe(document.getElementById('panels'), {subtree: true, childList: true, attributes: true});
      own[5].onpointerenter({pointerType: 'mouse'});
      document.body.dataset.painted = seen.takeRecords().length;
    """
    dom, console = opened(tab, replace(page, scenes=[scene]).html, tmp_path, keys)
    assert not console and 'data-wide="false"' in dom
    assert 0 < int(re.search('data-painted="([0-9]+)"', dom)[1]) <= 12 * 2
    assert "Patch 5 (row 0, column 5)" in dom


def test_the_command_writes_page_and_twin_and_says_what_the_miniature_knows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("embedlens.groups.CALIBRATION", 4)  # this is about what is written
    picture().save("some.png")
    before = Path("some.png").read_bytes()
    done = CliRunner().invoke(app, ["explore", "some.png", "--out", "some.html"])
    assert isinstance(done.exception, EmbedLensError) and "name another --out" in str(done.exception)
    assert Path("some.png").read_bytes() == before
    done = CliRunner().invoke(app, ["explore", "some.png"])
    assert done.exit_code == 0, done.output
    assert Path("some-explored.html").is_file() and Path("some-explored.png").is_file()
    assert "knows only the drawn world" in done.output and "SmolVLM-256M" in done.output
