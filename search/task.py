"""A task of lm-evaluation-harness as the objective, for models that are big enough to have a score.

Its data come from the Hub, or from a folder of one's own.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from slm.config import ConfigError, schema

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from slm.evaluation import Accuracy
    from slm.model import LanguageModel


@schema
class TaskConfig:
    """What `task_error` asks.

    name: of the task; None: none. folder: with tasks of your own; None: lm-eval's. metric: the
    share of right answers among its figures. num_fewshot: examples before each question; None: as
    many as the task says. limit: only so many questions; None: all.
    """

    name: str | None = None
    folder: Path | None = None
    metric: str = "acc"
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(gt=0)] | None = None

    def __post_init__(self) -> None:
        if self.name is None:
            return
        from slm.harness import task_problems

        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError([f"folder: '{self.folder}': there is no such folder"])
        if problems := task_problems([self.name], self.folder):
            raise ConfigError([f"name: {problem.partition(': ')[2]}" for problem in problems])

    @property
    def folders(self) -> list[Path]:
        """With tasks that lm-eval does not have."""
        return [] if self.folder is None else [self.folder]

    def load(self) -> None:
        """Load its data, if there is a task. Raises ConfigError without them or `metric`."""
        if self.name is None:
            return
        from slm.harness import load_tasks

        metrics = load_tasks([self.name], self.folders)
        # A group of tasks has what it makes of theirs.
        self._check_metric(metrics.get(self.name, [self.metric]))

    def _check_metric(self, found: Iterable[str]) -> None:
        if self.metric not in found:
            raise ConfigError(
                [f"task.metric: '{self.name}' has {', '.join(found)}, got '{self.metric}'"]
            )

    def accuracy(
        self, model: LanguageModel, tokenizer: Tokenizer, batch_size: int, seed: int
    ) -> Accuracy:
        """The share of right answers, with its 95 % interval.

        Raises ConfigError if the task cannot be loaded, or has no such metric.
        """
        from slm.data.tokenizer import end_of_text_id
        from slm.evaluation import Accuracy
        from slm.harness import answering, run_tasks

        assert self.name is not None
        # lm-eval draws bars there, in the middle of the search's line.
        with redirect_stderr(io.StringIO()):
            result = run_tasks(
                answering(model, tokenizer, [end_of_text_id(tokenizer)], batch_size, None),
                [self.name],
                self.folders,
                {"num_fewshot": self.num_fewshot, "limit": self.limit},
                seed,
            )[self.name]
        self._check_metric(result.metrics)
        figure = result.metrics[self.metric]
        # Of some metrics lm-eval has no error: anything is possible then.
        low, high = figure.low or 0.0, 1.0 if figure.high is None else figure.high
        return Accuracy(figure.value, max(0.0, low), min(1.0, high), result.n)
