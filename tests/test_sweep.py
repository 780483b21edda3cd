"""Many arms in one sweep give what each question alone gives; controls are matched, seeded and repeatable."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import label

import embedlens as el
from embedlens import EmbedLensError, kept, prefix, sweep, tasks
from embedlens.arms import block_alive, random_alive, random_block
from embedlens.groups import TokenGroups
from embedlens.interventions import EnterAt, Prune, Rescale, Silence, SkipSublayers
from embedlens.patches import Frame, PatchGrid
from embedlens.sweep import BASELINE, Arm, dead_arms, everywhere, members, pruning, run_arms, sink_arms, skipping


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """A random model never ends one."""
    for module in (sweep, tasks):
        monkeypatch.setattr(module, "answer_tokens", lambda _: 4)


def partition(dead, vit, llm) -> TokenGroups:
    return TokenGroups(vit, llm, dead, ~(dead | vit | llm), met={})


def ranked(model, prompts, n_dead: int = 4, none_in: tuple[int, ...] = ()) -> list[TokenGroups]:
    """Groups by rank of the norm: a stand-in that finds something in any model. None in pictures of these widths."""
    found = []
    for prompt in prompts:
        ranks = prompt.embeds[prompt.visual].norm(dim=-1).argsort(descending=True).argsort().cpu()
        count = 0 if prompt.grid.frame.width in none_in else 1
        dead = (ranks >= 2) & (ranks < 2 + count * n_dead)
        found.append(partition(dead, (ranks == 0) & (count > 0), (ranks == 1) & (count > 0)))
    return found


def few(n: int = 3) -> list[tasks.Item]:
    """Questions of several kinds, with short and with long answers."""
    return tasks.family_questions("general", 5)[:n] + tasks.family_questions("grounding", 3 + n)[3:]


def several_on_a_picture() -> list[tasks.Item]:
    """Questions of other kinds on pictures asked before, not one after the other."""
    items = few()
    again = [tasks.Item(item.sample, other.question) for item, other in zip(items, items[1:], strict=False)]
    return items + again


ARMS = [
    BASELINE,
    pruning("-dead", partial(members, names=("dead",))),
    pruning("-random", partial(sweep.random_alive, matched=("dead",)), seed=3),
    skipping("skip", partial(members, names=("dead", "LLM sink")), at=(0.5, 1)),
    everywhere("silence", Silence("mlp")),
    everywhere("late and small", EnterAt(1), Rescale(0.5)),
]


def alone(model, item, arm, groups) -> str:
    """One question under one arm, as plainly as it can be written."""
    prompt = model.prompt(item.sample.image, item.question.text)
    of_picture = groups(model, [prompt])[0]
    plan = arm.act(of_picture, prompt.grid, sweep.generator(item.sample.id, arm.name, arm.seed))
    if not plan:
        return model.answer(prompt, tasks.answer_tokens(model))
    with el.intervene(model, *plan):
        return model.answer(prompt, tasks.answer_tokens(model))


# --- the sweep equals one question after the other -------------------------------------------------------------------


def test_a_sweep_answers_what_each_question_alone_is_answered(tiny):
    model, items = tiny, several_on_a_picture()[::2]
    groups = partial(ranked, none_in=(min(item.sample.width for item in items),))
    table = run_arms(model, items, ARMS, groups, batch_size=3)
    assert list(table.item) == [place for place in range(len(items)) for _ in ARMS]
    assert list(table.arm[: len(ARMS)]) == [arm.name for arm in ARMS]
    for row in table.itertuples():
        item, arm = items[row.item], next(arm for arm in ARMS if arm.name == row.arm)
        assert row.prediction == alone(model, item, arm, groups), (row.arm, row.question)
        assert (row.question, row.answer, row.id) == (item.question.text, item.question.answer, item.sample.id)
        assert row.correct == tasks.score(item.question, row.prediction)
        if row.kind == "box":
            assert row.correct_original == tasks.box_score(item, row.prediction, "original")
        else:
            assert row.correct_original == row.correct
    texts = table.pivot(index="item", columns="arm", values="prediction")
    assert any((texts[arm] != texts["baseline"]).any() for arm in ("-dead", "-random", "silence"))


def test_each_picture_is_seen_and_grouped_once_whatever_the_questions_and_arms(tiny, monkeypatch):
    seen, grouped = [], []
    features = tiny._features
    monkeypatch.setattr(tiny, "_features", lambda pixels: seen.append(len(pixels)) or features(pixels))

    def groups(model, prompts):
        grouped.extend(prompts)
        return ranked(model, prompts)

    items = several_on_a_picture()
    pictures = {item.sample.id for item in items}
    run_arms(tiny, items, ARMS, groups, batch_size=2)
    assert len(items) > len(pictures) == sum(seen) == len(grouped)


def test_pictures_that_do_not_fit_together_run_in_halves_and_are_answered_the_same(tiny, monkeypatch):
    items = several_on_a_picture()
    whole = run_arms(tiny, items, ARMS, ranked)
    tried = []

    def short(model, cases, new_tokens, batch_size):
        tried.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefix.answers(model, cases, new_tokens, batch_size)

    monkeypatch.setattr(sweep, "answers", short)
    assert run_arms(tiny, items, ARMS, ranked, batch_size=8).equals(whole) and tried[:3] == [8, 4, 2]
    assert set(tried[3:]) <= {2}  # what did not fit once is not tried again


def test_arms_that_do_not_act_cost_one_baseline_answer(tiny, monkeypatch):
    asked, answers = [], sweep.answers
    monkeypatch.setattr(sweep, "answers", lambda of, cases, *rest: asked.extend(cases) or answers(of, cases, *rest))
    items = few()
    table = run_arms(tiny, items, sink_arms(), lambda model, prompts: ranked(model, prompts, none_in=(112, 84, 75, 63)))
    idle = table[table.arm != "others skip MLP-2"]
    assert not idle.acted.any() and not idle.tokens.any()
    assert idle.groupby("item").prediction.nunique().eq(1).all()
    assert table[table.arm == "others skip MLP-2"].acted.all()
    assert len(asked) == 2 * len(items)


def test_tokens_says_how_many_an_arm_acted_on(tiny):
    items = few()
    several = Arm("several", lambda groups, grid, rng: [Prune(groups.dead), SkipSublayers(groups.sink, at=[0])])
    table = run_arms(tiny, items, [*ARMS, several], ranked)
    found = table.groupby("arm").tokens.agg(["min", "max"])
    wanted = {"baseline": 0, "-dead": 4, "-random": 4, "skip": 5, "silence": 16, "late and small": 16, "several": 6}
    for arm, count in wanted.items():
        assert tuple(found.loc[arm]) == (count, count)


# --- sharded, resumed, reordered -------------------------------------------------------------------------------------


def rows(table):
    names = ["id", "question", "arm", "seed"]
    return table.drop(columns="item").sort_values(names).reset_index(drop=True)


def test_a_sweep_in_other_order_or_shared_out_gives_the_same_table(tiny):
    items = several_on_a_picture()[:6]
    arms = dead_arms(seeds=1)
    whole = rows(run_arms(tiny, items, arms, ranked))
    turned = rows(run_arms(tiny, items[::-1], arms[::-1], ranked, batch_size=2))
    one, two = (run_arms(tiny, items[half::2], arms, ranked) for half in (0, 1))
    assert whole.equals(turned)
    assert whole.equals(rows(pd.concat([one, two])))


def test_a_sweep_that_was_killed_goes_on_where_rows_are_kept(tiny, tmp_path, monkeypatch):
    items = few(2)
    whole = run_arms(tiny, items, ARMS, ranked, batch_size=2)
    monkeypatch.setenv(kept.ROWS, str(tmp_path))
    monkeypatch.setattr(sweep, "CHUNK", 1)
    calls, answers = [], sweep.answers

    def killed(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answers(*given)

    monkeypatch.setattr(sweep, "answers", killed)
    with pytest.raises(KeyboardInterrupt):
        run_arms(tiny, items, ARMS, ranked, batch_size=2)
    for _ in range(2):
        assert run_arms(tiny, items, ARMS, ranked, batch_size=2).equals(whole)
    assert len(calls) == 1 + -(-len(items) // 2)  # each chunk once, and the one that was in flight


# --- controls --------------------------------------------------------------------------------------------------------


def square_grid(rows: int = 6, cols: int = 7) -> PatchGrid:
    return PatchGrid(rows, cols, Frame.stretch(100, 100))


def random_groups(seed: int, n: int, share: float = 0.25) -> TokenGroups:
    kind = torch.from_numpy(np.random.default_rng(seed).choice(4, n, p=[1 - share - 0.1, share, 0.05, 0.05]))
    return partition(kind == 1, kind == 2, kind == 3)


def blocks(mask: torch.Tensor, grid: PatchGrid) -> int:
    """Number of connected parts."""
    return label(mask.reshape(grid.rows, grid.cols).numpy())[1]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("control", [random_alive, block_alive])
@pytest.mark.parametrize("matched", [("dead",), ("dead", "ViT sink", "LLM sink")])
def test_controls_are_of_the_matched_size_and_alive(seed, control, matched):
    grid = square_grid()
    groups = random_groups(seed, len(grid))
    size = sum(int(groups.named[name].sum()) for name in matched)
    mask = control(groups, grid, sweep.generator(seed, "control", 0), matched=matched)
    assert 0 < int(mask.sum()) == size < int(groups.alive.sum())
    assert not (mask & ~groups.alive).any()


def test_alive_tokens_on_things_and_on_the_background_are_told_by_the_box_of_every_object_and_word(tiny):
    asked = few(8)
    items = [next(item for item in asked if item.sample.annotations), next(i for i in asked if i.sample.writing)]
    crowd = replace(items[1].sample, annotations=tuple(e | {"iscrowd": 1} for e in items[1].sample.annotations))
    seen = {}

    def control(groups, grid, rng, among):
        seen[grid, among] = sweep.random_alive(groups, grid, rng, ("dead",), among)
        return seen[grid, among]

    kinds = ("things", "background")
    arms = [pruning(among, partial(control, among=among)) for among in kinds]
    run_arms(tiny, [items[0], tasks.Item(crowd, items[1].question)], arms, partial(ranked, n_dead=6), max_new_tokens=1)
    assert len(seen) == 4 and any(mask.any() for mask in seen.values())
    for sample in (items[0].sample, crowd):
        grid = tiny.prompt(sample.image, "?").grid
        boxes = [entry["bbox"] for entry in sample.annotations if not entry["iscrowd"]] + list(sample.writing)
        for index in range(len(grid)):
            x0, y0, x1, y1 = grid.box(index)
            shows = any(min(x1, x + w) > max(x0, x) and min(y1, y + h) > max(y0, y) for x, y, w, h in boxes)
            assert not seen[grid, "background" if shows else "things"][index]
    groups = random_groups(0, 64)
    with pytest.raises(EmbedLensError, match="where boxes are known"):
        sweep.random_alive(groups, square_grid(), sweep.generator(0, "a", 0), ("dead",), "things")


@pytest.mark.parametrize("seed", range(3))
def test_a_block_is_connected_where_the_pool_has_room_and_random_tokens_are_not(seed):
    grid, rng = square_grid(), np.random.default_rng(seed)
    whole = torch.ones(len(grid), dtype=torch.bool)
    size = int(rng.integers(8, 20))
    assert blocks(random_block(whole, size, grid, rng), grid) == 1
    assert blocks(sweep.random_tokens(whole, size, rng), grid) > 1
    halves = torch.arange(len(grid)) % grid.cols != 3  # 18 tokens on either side of a gap
    for size, parts in ((18, 1), (19, 2)):  # no room in one part: as few blocks as possible
        mask = random_block(halves, size, grid, rng)
        assert blocks(mask, grid) == parts and int(mask.sum()) == size and not (mask & ~halves).any()


def test_chance_is_seeded_by_picture_arm_and_seed_and_by_nothing_else():
    grid = square_grid()
    groups = random_groups(0, len(grid))

    def drawn(picture, arm, seed):
        return sweep.random_alive(groups, grid, sweep.generator(picture, arm, seed), matched=("dead",)).tolist()

    first = drawn(1, "a", 0)
    torch.manual_seed(5)
    np.random.seed(5)
    assert drawn(1, "a", 0) == first
    assert all(drawn(*other) != first for other in [(2, "a", 0), (1, "b", 0), (1, "a", 1)])
    assert sweep.generator(17, "-random", 4).integers(2**30) == 102723451  # on every machine and in every process


# --- the paper's arms ------------------------------------------------------------------------------------------------


def test_the_sink_arms_do_what_their_names_say():
    grid = square_grid()
    groups = random_groups(1, len(grid))
    done = {arm.name: arm.act(groups, grid, sweep.generator(0, arm.name, 0)) for arm in sink_arms()}
    assert not done.pop("baseline")
    masks = {name: plan[0].mask for name, plan in done.items()}
    assert torch.equal(masks["-LLM sinks"], groups.llm_sink) and torch.equal(masks["-ViT sinks"], groups.vit_sink)
    assert torch.equal(masks["-all sinks"], groups.sink)
    assert torch.equal(masks["others skip MLP-2"], ~groups.sink)
    skipped = {name: plan[0].at for name, plan in done.items() if isinstance(plan[0], SkipSublayers)}
    assert list(skipped.values()) == [(1.5,), (0.5, 1), (0.5, 1, 1.5), (1.5,)]
    assert all(torch.equal(masks[name], groups.llm_sink) for name in list(skipped)[:3])


def test_the_dead_arms_have_both_sizes_a_block_things_background_and_five_seeds():
    names = [arm.name for arm in dead_arms()]
    assert names[:3] == ["baseline", "-dead", "-dead and sinks"]
    controls = {name: [arm.seed for arm in dead_arms() if arm.name == name] for name in names[3:]}
    assert len(controls) == 5 and all(seeds == [0, 1, 2, 3, 4] for seeds in controls.values())
    grid = square_grid()
    groups = replace(random_groups(2, len(grid)), on_things=torch.arange(len(grid)) % 2 == 0)
    rng = np.random.default_rng(0)
    sizes = {arm.name: int(arm.act(groups, grid, rng)[0].mask.sum()) for arm in dead_arms()[1:]}
    assert sizes["-random, as many as dead"] == sizes["-block, as many as dead"] == sizes["-dead"]
    assert sizes["-random, as many as dead and sinks"] == sizes["-dead and sinks"] > sizes["-dead"]
