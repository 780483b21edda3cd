"""Answers as real models give them, and what is asked of each family so that it answers in a word."""

from functools import cache

import pytest

from embedlens import paired, rules, scoring, tasks
from embedlens.families.instructions import LETTER, SHORT, VICUNA_V1, instructions_of
from embedlens.interventions import Silence
from embedlens.samples import Question
from embedlens.sweep import BASELINE, everywhere, run_arms

LLAVA, NEXT = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"
MISTRAL, ONEVISION = "llava-hf/llava-v1.6-mistral-7b-hf", "llava-hf/llava-onevision-qwen2-7b-ov-hf"
QWEN, QWEN3, INTERNVL = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-VL-8B-Instruct", "OpenGVLab/InternVL3-8B-hf"
PETS = ("cat", "dog", "hot dog", "bus")

# kind, the right answer, whether it is right what a model wrote; the plainest answers are examples of `scoring`
ANSWERS = """
existence | yes | 1 | Yes, there is a dog in the picture. / There is a dog on the left.
existence | no | 1 | There isn't a dog in the picture.
existence | yes | 0 | Yes, but it is not a dog. / Yes and no. / Yes, but it isn’t a dog.
existence | yes | 0 | No, there is a dog on the left.
existence | no | 0 | No, wait, yes. / There is no way to tell. / No, there is a dog. / There is no dog on the left.
count | two | 1 | 2 / Two (2)
count | two | 0 | two dogs and one cat / more than two / 2nd / approximately two
count | one | 0 | One is left, one is right. / no one
count | zero | 1 | There are no dogs.
choice | B | 1 | B / B. dog / The answer is B. / A dog / B. The picture shows a dog. / B - dog
choice | A | 0 | A dog
choice | B | 0 | B. cat / Both / B. 0.45, at the top left / Yes, a dog
choice | D | 1 | There is a bus.
colour | red | 0 | red and white / red or maroon
colour | purple | 1 | Violet
relation | left | 1 | The dog is to the left of the cat.
relation | below | 0 | below, 0.38, 0.62, 0.66]
where | top left | 1 | in the top-left corner
where | left | 0 | top left
where | top | 1 | at the top center
where | center | 0 | top center
where | left | 1 | middle left / There is a dog on the left.
object | dog | 1 | It is a dog.
object | dog | 0 | Yes, a dog / A hot dog
object | wine glass | 0 | glass
object | couch | 1 | A sofa.
word | STOP | 1 | A sign that says STOP
word | STOP | 0 | STOP or GO / STOPPED / It does not say "STOP". / I cannot read STOP
character | A | 1 | A
character | I | 0 | I’m not sure
box | [0.10, 0.20, 0.50, 0.60] | 1 | It is at [0.1, 0.2, 0.5, 0.6].
box | [0.10, 0.20, 0.50, 0.60] | 0 | [100, 200, 500, 600] / [0.10, 0.20, 0.50,
box | [100, 200, 500, 600] | 1 | the dog[[101, 199, 505, 590]] / (101,199),(505,590)
box | [100, 200, 500, 600] | 1 | ```json [{"bbox_2d": [101, 199, 505, 590], "label": "dog"}] ```
box | [100, 200, 500, 600] | 0 | [0.10, 0.20, 0.50, 0.60]
"""
CASES = [line.split(" | ", 3) for line in ANSWERS.strip().splitlines()]
CASES = [(kind, answer, right, text) for kind, answer, right, texts in CASES for text in texts.split(" / ")]


@pytest.mark.parametrize(("kind", "answer", "right", "text"), CASES)
def test_an_answer_is_read_as_a_person_would_and_two_answers_are_none(kind, answer, right, text):
    choices = {"existence": ("yes", "no"), "choice": PETS}.get(kind, ())
    asked = "Is there a dog in the picture?" + SHORT if kind == "existence" else "?"
    question = Question(asked, answer, "general", kind, choices)
    assert scoring.score(question, text) == float(right)
    if kind == "existence":
        assert scoring.said_yes(text, asked) == (scoring.said(question, text) == "yes")


@cache
def item(kind: str) -> tasks.Item:
    return tasks.questions(kind, n=1)[0]


QWENS = ("short words or phrases if possible.", " Please answer yes or no.", "correct answer from the options above.")


@pytest.mark.parametrize("name", [LLAVA, NEXT, INTERNVL, QWEN])
def test_a_published_model_is_asked_in_the_words_of_its_authors(twin_of, name):
    _, model = twin_of(name)
    suffixes = QWENS if name == QWEN else (SHORT, SHORT, LETTER)
    for kind, suffix in zip(("colour", "existence", "choice"), suffixes, strict=True):
        asked = tasks.in_words_of(model, [item(kind)])[0].question
        assert asked.text.startswith(item(kind).question.text.split("?")[0]) and asked.text.endswith(suffix)
        assert asked.answer == item(kind).question.answer
    assert tasks.asked_with(model)["answer_tokens"] > 12
    if name == QWEN:  # whoever asks
        assert tasks.evaluate(model, [item("colour")]).question[0].endswith(suffixes[0])
        assert run_arms(model, [item("colour")], [BASELINE]).question[0].endswith(suffixes[0])


def test_the_miniature_is_asked_as_it_was_trained(miniature, tiny):
    items = [item(kind) for kind in ("colour", "existence", "choice", "box")]
    for model in (miniature, tiny):
        assert tasks.in_words_of(model, items) == items and tasks.asked_with(model) == {}
        assert instructions_of(model).system == ""
    assert tasks.answer_tokens(miniature) == 12


@pytest.mark.parametrize("name", [LLAVA, NEXT, MISTRAL, ONEVISION, QWEN, QWEN3, INTERNVL])
def test_only_models_in_vicunas_format_get_the_system_prompt_of_their_training(twin_of, name):
    _, model = twin_of(name)
    text = model.tokenizer.decode(model.prompt(item("colour").sample.image, "What?").ids.tolist())
    assert (VICUNA_V1 in " ".join(text.split())) == (name in (LLAVA, NEXT))
    assert ("system_prompt" in tasks.asked_with(model)) == (name in (LLAVA, NEXT))


SQUARE = [(name, way) for name in (QWEN, QWEN3) for way in ("letterbox", "stretch", "centre-crop")]


@pytest.mark.parametrize(("name", "way"), [*((name, "") for name in (LLAVA, QWEN, QWEN3, INTERNVL)), *SQUARE])
def test_a_box_is_where_the_model_sees_it_in_the_unit_of_its_family_and_fits_into_the_answer(twin_of, name, way):
    _, model = twin_of(name)
    model = model.with_preprocessing(way) if way else model
    sample, question = item("box")
    (asked,) = tasks.in_words_of(model, [item("box")])
    sides = sample.width, sample.height
    assert sides[0] != sides[1]
    seen = {"": sides, "centre-crop": (min(sides),) * 2}.get(way, (max(sides),) * 2)
    unit = (1, 1) if name == LLAVA else (1000, 1000)
    unit = model.family.enough(model.hf, model.processor, seen) if name == QWEN else unit
    left, top, right, bottom = (0, 0, *sides) if name == INTERNVL else model.prompt(sample.image, "?").grid.frame.box
    padded, numbers = scoring.box_of(question.answer), scoring.box_of(asked.question.answer)
    x0, y0, x1, y1 = scoring.in_original(padded, *sides)
    across = [min(max(0, (x * sides[0] - left) / (right - left)), 1) * unit[0] for x in (x0, x1)]
    down = [min(max(0, (y * sides[1] - top) / (bottom - top)), 1) * unit[1] for y in (y0, y1)]
    assert numbers == pytest.approx((across[0], down[0], across[1], down[1]), abs=1.01 if way else 0.51)
    how = instructions_of(model)
    written = how.written.format(asked.question.answer, "red potted plant")
    assert scoring.score(asked.question, written) == 1 == scoring.box_score(asked, written)
    needed = len(model.tokenizer(written, add_special_tokens=False)["input_ids"])
    assert 12 < needed < tasks.answer_tokens(model)
    if name == LLAVA:
        assert numbers == padded and "this sentence describes: the " in asked.question.text
    elif not way:
        assert scoring.box_score(asked, written, "original") == 1  # there is but one frame


def test_a_family_that_is_answered_no_better_than_of_another_picture_is_not_testable(tiny, monkeypatch):
    guards = ((tasks, "GUARD", 8), (tasks, "MOST_GUARD", 16))
    for guard in guards:
        monkeypatch.setattr(*guard)
    items = [*tasks.questions("existence", 20), *tasks.questions("colour", 20)]
    right = {(i.sample.id, i.question.text): i.question.answer for i in items}
    asked = []

    def answers(model, cases, *more):  # it sees colours, and says yes to whatever is asked
        asked.extend(prompts := [case.prompt for case in cases])
        return [
            "yes" if "Is there" in p.question else right.get((p.image.info.get("id"), p.question), "?") for p in prompts
        ]

    def prompts(model, images, questions):
        made = original(model, images, questions)
        for one, image in zip(made, images, strict=True):
            one.image.info["id"] = next(i.sample.id for i in items if i.sample.image == image)
        return made

    original = type(tiny).prompts
    monkeypatch.setattr(type(tiny), "prompts", prompts)
    monkeypatch.setattr(tasks, "answers", answers)
    with pytest.warns(UserWarning, match="'hallucination' rightly.* about another picture"):
        unable = tasks.able(tiny, items)
    assert list(unable) == ["hallucination"] and len(unable["hallucination"]) == 16
    assert len(asked) == 2 * (16 + 8)  # about colours eight are enough
    assert list(tasks.able(tiny, items)) == ["hallucination"] and len(asked) == 2 * (16 + 8)  # known by now
    monkeypatch.undo()
    for guard in guards:
        monkeypatch.setattr(*guard)
    table = run_arms(tiny, items, [BASELINE, everywhere("same", Silence("mlp"))])
    counts = table[table.arm == "same"].groupby("family").agg(asked=("item", "size"), testable=("testable", "all"))
    assert counts.asked.to_dict() == {"general": 20, "hallucination": 16}
    assert counts.testable.to_dict() == {"general": True, "hallucination": False}


def test_a_model_that_is_never_right_earns_no_verdict(tiny):
    items = tasks.family_questions("ocr", 6)
    table = run_arms(tiny, items, [BASELINE, everywhere("same", Silence("mlp"))])
    table = table.loc[table.index.repeat(400)]
    table["item"] = table["id"] = table.groupby("arm").cumcount()
    for correct, verdict in ((0.0, rules.UNTESTABLE), (1.0, rules.HOLDS)):
        one = paired.compare(table.assign(correct=correct), "same", "ocr")
        assert rules.conclude("all(kept > -0.01)", {"kept": [one.narrow]}) == verdict
    one = paired.compare(table.assign(correct=1.0, testable=False), "same", "ocr")
    assert rules.conclude("kept > -0.01", {"kept": one.narrow}) == rules.UNTESTABLE
    assert one.verdict == "undecided" and (one.change > -1) is None
