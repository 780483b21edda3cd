"""The loop that all stages share: schedule, checkpoints that resume, and a log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from training.recipe import Stage

SAVE_EVERY_S = 60
Measured: TypeAlias = "float | list[float]"  # a list has one value per layer


def autocast(device: str) -> torch.autocast:
    """bfloat16 where the machine has instructions for it; without them it is several times slower than float32."""
    quick = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or quick)


def seed_everything(seed: int, device: str = "cpu") -> None:
    """Every CPU training with the same steps gives the same weights; on a GPU speed comes first."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(device == "cpu", warn_only=True)
    torch.set_float32_matmul_precision("highest" if device == "cpu" else "high")
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


def progress(step: int, stage: Stage, seconds: float) -> float:
    """How much of a stage lies behind: of its steps, or of its time if that is what ends it."""
    by_step = step / stage.steps if stage.steps else 1.0
    return min(1.0, max(by_step, seconds / stage.seconds)) if stage.seconds else by_step


def along(step: int, stage: Stage, done: Tensor) -> float:
    """Progress for whoever draws batch `step`, in another process: its place among the steps, or the clock."""
    return float(done) if stage.seconds else progress(step, stage, 0.0)


def pace(step: int, stage: Stage, done: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine to 5 %."""
    if step < stage.warmup and not stage.seconds:
        return (step + 1) / stage.warmup
    part = done if stage.seconds else (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return min(1.0, (step + 1) / stage.warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def rounded(value: Measured) -> Measured:
    return [round(part, 4) for part in value] if isinstance(value, list) else round(value, 4)


def train(
    name: str,
    module: nn.Module,
    stage: Stage,
    optims: list[torch.optim.Optimizer],
    batches: Callable[[int, Tensor], Iterator[Any]],
    loss_of: Callable[[Any], tuple[Tensor, dict[str, float]]],
    measure: Callable[[], dict[str, Measured]],
    folder: Path,
    stop_after: int | None = None,
    clipped: Sequence[nn.Module] = (),
) -> list[dict[str, Any]]:
    """Train from the last checkpoint (or from the start) to the end of the stage.

    Args:
        batches: start step, how much of the stage lies behind (kept up to date here) -> iterator over batches.
        loss_of: batch -> loss and what to log beside it.
        measure: taken as often as the stage says, evenly, and at the end.
        folder: where `<name>.pt` (the checkpoint) and `<name>.jsonl` (the log) are.
        stop_after: leave after so many steps; the next call goes on from there.
        clipped: parts whose gradients are clipped each on its own; none: the whole module's together.

    Returns:
        the log: one record per 50 steps and per measurement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log_file = folder / f"{name}.pt", folder / f"{name}.jsonl"
    step, spent, log = 0, 0.0, []
    state = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
    if state and "optims" not in state:
        raise ValueError(
            f"{checkpoint} came home without its optimiser, so stage {name} cannot go on: "
            "ship it with --stage ship, or begin anew in another --folder"
        )
    if state:
        module.load_state_dict(state["module"])
        for optimiser, saved in zip(optims, state["optims"], strict=True):
            optimiser.load_state_dict(saved)
        step, spent, log = state["step"], state["seconds"], state["log"]
    done = torch.full((1,), progress(step, stage, spent)).share_memory_()  # processes that draw batches read it
    if done >= 1 and (state or not stage.steps):  # the clock never leaves a stage without one step
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
    every = max(1, stage.steps // stage.measurements)
    sums: dict[str, float] = {}
    summed = 0  # after a resume the first average is over fewer steps than 50

    def measured() -> dict[str, Measured]:
        module.eval()
        with torch.no_grad():
            found = {f"heldout/{key}": rounded(value) for key, value in measure().items()}
        module.train()
        return found

    if stage.seconds and not log:  # where it begins: what a cut training is compared with
        log.append({"step": 0, "samples": 0, "seconds": 0.0, **measured()})
        print(name, json.dumps(log[-1]), flush=True)
    module.train()
    for batch in batches(step, done):
        if step >= last:
            break
        before = float(done)
        for optimiser in optims:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * pace(step, stage, before)
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
        done[0] = progress(step, stage, spent + time.monotonic() - began)
        if stage.seconds:
            measuring = int(stage.measurements * float(done)) > int(stage.measurements * before)
        else:
            measuring = step == stage.steps or (step % every == 0 and stage.steps >= 10 * stage.measurements)
        if step % 50 == 0 or measuring:
            record: dict[str, Any] = {}
            if step % 50 == 0:
                record = {key: round(value / summed, 4) for key, value in sums.items()}
                sums, summed = {}, 0
            if measuring:
                record |= measured()
            seconds = spent + time.monotonic() - began
            log.append({"step": step, "samples": step * stage.batch, "seconds": round(seconds, 1), **record})
            print(name, json.dumps(log[-1]), flush=True)
        if done >= 1:
            break
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            save()
            saved_at = time.monotonic()
    save()
    module.eval()
    return log
