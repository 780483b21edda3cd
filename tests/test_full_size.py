"""The measurement of a full-size model runs on a small one; without a GPU it writes nothing."""

import sys

import pytest
import torch

from benchmarks import full_size
from embedlens import memory
from embedlens.memory import configs


def test_every_way_is_measured_and_no_memory_is_claimed_without_a_gpu(miniature):
    found = full_size.measured(memory.config_of("miniature"), "float32", "cpu", repeats=1)
    assert [name.split(":")[0] for name in found["ways"]] == ["retrieval", "trace", "prefill", "prefill", "sweep"]
    assert all(way["seconds"]["median"] > 0 and way["peak GiB"] is None for way in found["ways"].values())
    assert found["parameters"] == sum(parameter.numel() for parameter in miniature.hf.parameters())


def test_the_full_size_model_is_the_one_of_the_paper():
    assert memory.needed(configs()["llava-hf/llava-1.5-7b-hf"]).parameters == 7_063_427_072


def test_without_a_gpu_nothing_is_measured_or_written(tmp_path, monkeypatch):
    out = tmp_path / "full_size.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(full_size, "measured", lambda *_, **__: pytest.fail("it measures"))
    monkeypatch.setattr(sys, "argv", ["full_size", "--out", str(out)])
    with pytest.raises(SystemExit, match="nothing is measured"):
        full_size.main()
    assert not out.exists()
