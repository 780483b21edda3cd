"""Several processes that work on one study together: which of them this is, where its model goes, how they meet."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from embedlens.errors import EmbedLensError

ALONE = "run `unset WORLD_SIZE` to work in one process, or start several with accelerate launch or torchrun"


@dataclass(frozen=True)
class Processes:
    """Those that run this together, and which of them this is."""

    rank: int = 0
    count: int = 1

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes; nobody goes on before everybody is here."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


def own_device() -> str | None:
    """Where a process of several loads its model: its own GPU, or the CPU that all share; None: `load` chooses."""
    if _launched() == 1:
        return None
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def placed(device: Any) -> Any:
    """The device to load on: of several processes each has its own. EmbedLensError where these are to share "auto"."""
    own = own_device()
    if own is not None and device == "auto":
        raise EmbedLensError("device='auto' spreads one model over all GPUs: start one process, or leave it out")
    return own if own is not None and device in (None, "cuda") else device


def _met() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _launched() -> int:
    """How many processes there are by what a launcher left in the environment, in this run or in an earlier one."""
    number, rank, host, port = (os.environ.get(n, "") for n in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"))
    if number in ("", "1"):
        return 1
    whole = number.isdecimal() and rank.isdecimal() and int(rank) < int(number) and host and port
    if not whole and not _met():
        raise EmbedLensError(
            f"WORLD_SIZE={number} is in the environment without a RANK below it, MASTER_ADDR and MASTER_PORT: {ALONE}"
        )
    return int(number)


def processes(device: str) -> Processes:
    """This process alone, unless a launcher started several, for models on a "cpu" or "cuda". Call it before a model is
    loaded: then accelerate may look at the machine by itself, and without a GPU take each process for a single one."""
    launched = _launched()
    if launched == 1 and not _met():
        return Processes()
    from accelerate import PartialState

    try:
        state = PartialState(cpu=device == "cpu")  # told nothing, it takes processes without a GPU for single ones
    except (ValueError, RuntimeError) as error:  # of torch.distributed: a rank that is none, nobody to meet
        why = " ".join(str(error).split())
        raise EmbedLensError(f"WORLD_SIZE={launched}, but the processes cannot meet ({why}): {ALONE}") from error
    if state.num_processes < launched:
        raise EmbedLensError(
            f"{launched} processes were launched but accelerate knows of {state.num_processes}: where the model is on "
            "the CPU, make accelerate.PartialState(cpu=True) before anything else of accelerate, or let run make it"
        )
    return Processes(state.process_index, state.num_processes)
