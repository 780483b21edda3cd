"""The loop that all stages share: schedule, checkpoints that resume, and a log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.recipe import Stage

SAVE_EVERY_S = 120
MEASUREMENTS = 10  # per stage


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a tenth of a CPU step, for nothing here


def optimisers(
    module: nn.Module, stage: Stage, hidden: Callable[[str], bool] = lambda name: False
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices whose name `hidden` accepts if the stage has a `muon_lr`.

    Vectors, embeddings and heads are not decayed and never given to Muon.
    """
    muon, decayed, plain = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage.muon_lr and parameter.ndim == 2 and hidden(name):
            muon.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 and "embed" not in name else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([group for group in groups if group["params"]], lr=stage.lr, betas=(0.9, 0.95), fused=True)
    ]
    if muon:
        found.append(
            torch.optim.Muon(
                muon, lr=float(stage.muon_lr or 0), weight_decay=stage.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    for optimiser in found:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return found


def pace(step: int, stage: Stage) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to 5 %."""
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(
    name: str,
    module: nn.Module,
    stage: Stage,
    optims: list[torch.optim.Optimizer],
    batches: Callable[[int], Iterator[Any]],
    loss_of: Callable[[Any], tuple[Tensor, dict[str, float]]],
    measure: Callable[[], dict[str, float]],
    folder: Path,
    stop_after: int | None = None,
    clipped: Sequence[nn.Module] = (),
) -> list[dict[str, float]]:
    """Train from the last checkpoint (or from the start) to the end of the stage.

    Args:
        batches: start step -> iterator over batches.
        loss_of: batch -> loss and what to log beside it.
        measure: taken MEASUREMENTS times, evenly, and at the end; a very short stage is measured at its end only.
        folder: where `<name>.pt` (the checkpoint) and `<name>.jsonl` (the log) are.
        stop_after: leave after so many steps; the next call goes on from there.
        clipped: parts whose gradients are clipped each on its own; none: the whole module's together.

    Returns:
        the log: one record per 50 steps and per measurement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log_file = folder / f"{name}.pt", folder / f"{name}.jsonl"
    step, spent, log = 0, 0.0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        for optimiser, saved in zip(optims, state["optims"], strict=True):
            optimiser.load_state_dict(saved)
        step, spent, log = state["step"], state["seconds"], state["log"]
    if step >= stage.steps:
        return log

    def save() -> None:
        state = {
            "module": module.state_dict(),
            "optims": [optimiser.state_dict() for optimiser in optims],
            "step": step,
            "seconds": spent + time.monotonic() - began,
            "log": log,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)  # a kill while writing keeps the old one
        log_file.write_text("".join(json.dumps(record) + "\n" for record in log))

    began = saved_at = time.monotonic()
    last = stage.steps if stop_after is None else min(stage.steps, step + stop_after)
    every = max(1, stage.steps // MEASUREMENTS)
    sums: dict[str, float] = {}
    summed = 0  # after a resume the first average is over fewer steps than 50
    module.train()
    for batch in batches(step):
        if step >= last:
            break
        for optimiser in optims:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * pace(step, stage)
        loss, beside = loss_of(batch)
        loss.backward()
        for part in clipped or (module,):
            nn.utils.clip_grad_norm_([p for p in part.parameters() if p.grad is not None], 1.0)
        for optimiser in optims:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        for key, value in {"loss": loss.item(), **beside}.items():
            sums[key] = sums.get(key, 0.0) + value
        summed += 1
        measuring = step == stage.steps or (step % every == 0 and stage.steps >= 10 * MEASUREMENTS)
        if step % 50 == 0 or measuring:
            record: dict[str, float] = {}
            if step % 50 == 0:
                record = {key: round(value / summed, 4) for key, value in sums.items()}
                sums, summed = {}, 0
            if measuring:
                module.eval()
                with torch.no_grad():
                    record |= {f"heldout/{key}": round(value, 4) for key, value in measure().items()}
                module.train()
            seconds = spent + time.monotonic() - began
            log.append({"step": step, "samples": step * stage.batch, "seconds": round(seconds, 1), **record})
            print(name, json.dumps(log[-1]), flush=True)
        if step == stage.steps or time.monotonic() - saved_at > SAVE_EVERY_S:
            save()
            saved_at = time.monotonic()
    save()
    module.eval()
    return log
