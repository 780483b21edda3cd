"""The model that lmms-eval runs as `--model embedlens`; nothing else in this package needs lmms-eval."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from embedlens import lmms as plugin
from embedlens.errors import EmbedLensError
from embedlens.loading import load
from embedlens.processes import own_device, processes

try:
    import lmms_eval.tasks
    from lmms_eval.api.model import lmms as Base
    from loguru import logger

    MISSING = None
except ImportError as error:  # told when the model is asked for, so that this file can be read without lmms-eval
    Base, logger, MISSING = object, None, error.name


class EmbedLensModel(Base):
    """A model from `embedlens.load` under one intervention; every exception ends the run, as a score must not hide it.

    Args:
        pretrained, device, dtype, quantize, preprocessing: as `embedlens.load` takes them.
        intervention: a key of `lmms.INTERVENTIONS`.
        seed, layer, factor: of random interventions, for enter_at, for rescale.
        calibration: pictures to tell groups apart in, such as coco:/data/coco/val2017; default: drawn ones.
        batch_size: questions answered together, or auto: as many as fit, found by halving.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "miniature",
        intervention: str = "none",
        seed: Any = 0,
        layer: Any = None,
        factor: Any = None,
        calibration: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantize: str | None = None,
        preprocessing: str | None = None,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        **unknown: Any,
    ) -> None:
        if MISSING is not None:
            raise EmbedLensError(f"lmms-eval is needed ({MISSING} is missing): pip install 'embedlens[benchmarks]'")
        super().__init__()
        if unknown:
            raise EmbedLensError(
                f"--model_args has no {', '.join(unknown)}: pretrained, intervention, seed, layer, factor, "
                "calibration, device, dtype, quantize and preprocessing are known"
            )
        together = plugin.batch_size_of(batch_size)
        arm = plugin.arm_of(intervention, seed, layer, factor)
        place = own_device() or device
        launched = processes("cuda" if (place or "").startswith("cuda") else "cpu")
        self._rank, self._world_size = launched.rank, launched.count
        if self._world_size > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=place == "cpu")
        chosen = {"dtype": dtype, "quantize": quantize, "preprocessing": preprocessing}
        model = load(pretrained, device=place, **{name: value for name, value in chosen.items() if value is not None})
        self.answerer = plugin.Answerer(model, arm, calibration, together)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.answerer.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests.

        Raises:
            SystemExit: on any exception. lmms-eval's command line catches the ordinary ones and ends well without a
                score, or goes on with the next task.
        """
        answers: list[str] = []
        try:
            plugin.check_keys(sorted({request.args[4] for request in requests}), Path(lmms_eval.tasks.__file__).parent)
            said = self.answerer.answers(requests, self._asked)
            quiet = self.rank != 0 or bool(os.environ.get("TQDM_DISABLE"))
            bar = tqdm(said, total=len(requests), disable=quiet, unit="question")
            for one, request in zip(bar, requests, strict=True):
                context, _, kwargs, *_ = request.args
                self.cache_hook.add_partial("generate_until", (context, kwargs), one.text)
                answers.append(one.text)
            logger.info(self.answerer.report())
        except Exception as error:
            traceback.print_exc()
            raise SystemExit(f"embedlens: no score, because {error}") from error
        return answers

    def _asked(self, request: Any) -> plugin.Asked:
        _, messages_of, kwargs, doc_id, task, split = request.args
        picture, question = plugin.one_question(messages_of(self.task_dict[task][split][doc_id]))
        return plugin.Asked(picture, question, int(doc_id), *plugin.generation(kwargs))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not supported: an intervention is defined on answers here."""
        raise EmbedLensError("the task scores likelihoods: choose one of output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: one question a picture."""
        raise EmbedLensError("the task has several rounds: choose one of output_type generate_until")
