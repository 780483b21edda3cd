"""Inside lmms-eval: the answers of `tasks`, firings counted, nothing swallowed, no empty answer scored."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import lmms_task
import pytest
import torch
import yaml
from lmms_task import TASK, write_task

from embedlens import EmbedLensError, Prune, intervene, lmms, tasks
from embedlens.groups import token_groups
from embedlens.interventions import Silence
from embedlens.lmms import Answerer, Asked, arm_of, generation, one_question, until

INSTALLED = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed: pip install lmms-eval")
KINDS, N = ("colour", "word"), 4


def asked(kinds=KINDS, n=N):
    return [item for kind in kinds for item in tasks.questions(kind, n, 0)]


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def of(items, new_tokens=tasks.ANSWER_TOKENS):
    """Questions as the plugin gets them."""
    return [Asked(item.sample.image, item.question.text, place, new_tokens) for place, item in enumerate(items)]


def alone(model, arm, item):
    (said,) = Answerer(model, arm).answers(of([item], 12))
    return said


PICTURE, TEXT = {"type": "image", "url": "the picture"}, {"type": "text", "text": "What?"}


# Without lmms-eval


def test_the_answers_are_those_of_the_model_under_the_intervention(miniature):
    item = tasks.questions("colour", 1, 3)[0]
    prompt = miniature.prompt(item.sample.image, item.question.text)
    plain = alone(miniature, arm_of("none"), item)
    assert plain.text == miniature.answer(prompt, 12) and plain.tokens == 0
    dead = token_groups(miniature, prompt).dead
    said = alone(miniature, arm_of("prune_dead"), item)
    with intervene(miniature, Prune(dead)):
        assert said.text == miniature.answer(prompt, 12)
    assert said.tokens == int(dead.sum())
    silent = alone(miniature, arm_of("silence_mlp"), item)
    with intervene(miniature, Silence("mlp")):
        assert silent.text == miniature.answer(prompt, 12)
    assert silent.tokens == len(prompt.grid)


@pytest.mark.parametrize("arm", [arm_of("prune_random", seed=1), arm_of("enter_at", layer=2)])
def test_a_batch_gives_the_answers_of_one_question_at_a_time(miniature, arm, monkeypatch):
    tower = []
    prompts = type(miniature).prompts
    monkeypatch.setattr(type(miniature), "prompts", lambda self, *own: tower.append(len(own[0])) or prompts(self, *own))
    questions = [*of(asked()), *of(asked()[:3], 2)]  # of two lengths
    together, single = Answerer(miniature, arm, batch_size=5), Answerer(miniature, arm, batch_size=1)
    said = list(together.answers(questions))
    assert tower == [5, 3, 2, 1]
    assert said == list(single.answers(questions))
    assert len({one.text for one in said}) > 3
    counts = [(one.asked, one.acted, one.tokens) for one in (together, single)]
    assert counts[0] == counts[1] and counts[0][0] == len(questions)
    assert together.report() == single.report()


def test_a_batch_that_does_not_fit_is_answered_in_halves(miniature, monkeypatch):
    tried = []

    def short(model, cases, *more):
        tried.append(len(cases))
        if len(cases) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ["yes"] * len(cases)

    monkeypatch.setattr(lmms, "answers", short)
    assert len(list(Answerer(miniature, arm_of("none")).answers(of(asked())))) == len(asked())
    assert tried == [8, 4, 2, 2, 2, 2]  # on a CPU "auto" begins with eight


def test_what_acted_is_counted_and_what_never_acted_gives_no_score(miniature):
    item = tasks.questions("colour", 1, 3)[0]
    pruned = Answerer(miniature, arm_of("prune_random", seed=1))
    list(pruned.answers(of([item], 12)))
    assert (pruned.asked, pruned.acted) == (1, 1) and "acted on 1 of 1 pictures" in pruned.report()
    without = Answerer(miniature, arm_of("prune_llm_sinks"))  # the miniature has none
    assert next(without.answers(of([item], 12))).tokens == 0
    with pytest.raises(EmbedLensError, match="found nothing to act on in any of 1 pictures"):
        without.report()


def test_an_empty_answer_ends_the_run(miniature, monkeypatch):
    monkeypatch.setattr(lmms, "answers", lambda model, cases, *more: ["fine", " "])
    with pytest.raises(EmbedLensError, match="about picture 1 is empty, and no score counts it"):
        list(Answerer(miniature, arm_of("none")).answers(of(asked()[:2])))


def test_a_task_is_decoded_greedily_up_to_its_stops():
    assert generation({"max_new_tokens": 16, "until": ["\n\n"], "temperature": 0}) == (16, ("\n\n",))
    assert generation({})[0] == lmms.NEW_TOKENS
    assert until("yes\nbecause", ["\n\n", "\n"]) == "yes"


def test_one_picture_and_one_question_are_read_from_a_turn():
    assert one_question(user(PICTURE, TEXT)) == ("the picture", "What?")
    refused = [user(TEXT), user(PICTURE, PICTURE, TEXT), user(PICTURE, TEXT, {"type": "video", "url": "v"})]
    refused += [user(PICTURE, TEXT) * 2, [{"role": "system", "content": [TEXT]}, *user(PICTURE, TEXT)]]
    for messages in refused:
        with pytest.raises(EmbedLensError, match="choose tasks"):
            one_question(messages)


def test_the_task_asks_the_questions_of_tasks_and_scores_as_it_does(tmp_path):
    file = write_task(tmp_path, KINDS, N)
    docs = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    for doc, item in zip(docs, asked(), strict=True):
        assert lmms_task.text_of(doc) == item.question.text and doc["answer"] == item.question.answer
        assert lmms_task.pictures_of(doc)[0].tobytes() == item.sample.image.tobytes()
        assert lmms_task.scored(doc, [item.question.answer]) == {"right": 1.0}
        assert lmms_task.scored(doc, ["nonsense"]) == {"right": 0.0}
    written = yaml.load(file.read_text().replace("!function ", ""), yaml.SafeLoader)
    assert Path(written["dataset_kwargs"]["data_files"]["test"]).is_file()


def test_a_task_that_a_judge_scores_is_refused_without_its_key(tmp_path, monkeypatch):
    """As lmms-eval lays out HallusionBench (the key is read in a module beside), MMBench (by its template), MM-Vet."""
    bench = tmp_path / "bench"
    bench.mkdir()
    scored = "task: {}\nprocess_results: !function {}.scored\n"
    (bench / "hallusion.yaml").write_text(scored.format("hallusion_bench_image", "evaluate_hb"))
    (bench / "evaluate_hb.py").write_text("from lmms_eval.tasks.bench.utils import scored\n")
    (bench / "utils.py").write_text('API_KEY = os.getenv("OPENAI_API_KEY", "YOUR_API_KEY")\n')
    (bench / "mmbench.yaml").write_text("task: mmbench_en_dev\ninclude: _template_yaml\n")
    (bench / "_template_yaml").write_text("process_results: !function en_utils.scored\n")
    (bench / "en_utils.py").write_text('key = os.environ["AZURE_API_KEY"] or os.environ.get("OPENAI_API_KEY")\n')
    (bench / "mmvet.yaml").write_text(scored.format("mmvet", "vet"))
    (bench / "vet.py").write_text("from lmms_eval.llm_judge import get_server\n")
    (bench / "pope.yaml").write_text(scored.format('"pope"', "pope"))
    (bench / "pope.py").write_text("KEYBOARD = 1\n")
    for key in ("OPENAI_API_KEY", "AZURE_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    for task in ("hallusion_bench_image", "mmbench_en_dev", "mmvet"):
        with pytest.raises(EmbedLensError, match=f"{task} is scored by a judge .* OPENAI_API_KEY is not set"):
            lmms.check_keys(["pope", task], tmp_path)
    lmms.check_keys(["pope", "embedlens_miniature"], tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    lmms.check_keys(["hallusion_bench_image", "mmbench_en_dev", "mmvet"], tmp_path)


def test_without_lmms_eval_its_model_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "embedlens.lmms_model", raising=False)
    model = importlib.import_module("embedlens.lmms_model").EmbedLensModel
    with pytest.raises(EmbedLensError, match=r"pip install 'embedlens\[benchmarks\]'"):
        model()
    del sys.modules["embedlens.lmms_model"]  # the next one finds what is there


# With lmms-eval


def evaluate(tmp_path, model_args, *more):
    write_task(tmp_path / "task", KINDS, N)
    command = [sys.executable, "-m", "lmms_eval", "--model", lmms.MODEL, "--model_args", model_args]
    command += ["--tasks", TASK, "--include_path", str(tmp_path / "task"), "--batch_size", "auto"]
    command += ["--log_samples", "--output_path", str(tmp_path / "out"), *more]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)


@needs_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize("intervention", ["none", "prune_dead"])
def test_lmms_eval_scores_the_answers_that_tasks_scores(tmp_path, intervention, miniature):
    assert "embedlens" in {entry.name for entry in entry_points(group="lmms_eval.models")}
    done = evaluate(tmp_path, f"pretrained=miniature,intervention={intervention},device=cpu")
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob(f"*samples_{TASK}.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    given = [row["filtered_resps"] for row in rows]
    if intervention == "none":
        expected = tasks.evaluate(miniature, asked(), batch_size=1)["prediction"].tolist()
    else:
        dead = Answerer(miniature, arm_of("prune_dead"), batch_size=1)
        expected = [said.text for said in dead.answers(of(asked()))]
        assert f"acted on {dead.acted} of {len(rows)} pictures" in done.stdout + done.stderr
    assert given == expected
    right = [tasks.score(item.question, answer) for item, answer in zip(asked(), given, strict=True)]
    (results,) = (tmp_path / "out").rglob("*results.json")
    score = json.loads(results.read_text())["results"][TASK]["right,none"]
    assert score == pytest.approx(sum(right) / len(right))


@needs_lmms_eval
@pytest.mark.slow
def test_an_intervention_that_never_acts_gives_no_score(tmp_path):
    done = evaluate(tmp_path, "pretrained=miniature,intervention=prune_llm_sinks,device=cpu")
    assert "found nothing to act on" in done.stderr and done.returncode != 0
    assert not list((tmp_path / "out").rglob("*results.json"))
