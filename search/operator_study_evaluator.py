"""What an operator study finds of each model besides its loss: answers to the word cloze."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from search.cell_evaluator import CellEvaluator
from search.cells import Cell
from search.evaluate import ACCURACY_BATCH_SIZE

if TYPE_CHECKING:
    from search.proxy import ProxyTraining
    from slm.data import PackedCorpus
    from slm.data.cloze import ClozeItem

# Every model answers the same questions.
CLOZE_SEED = 0


@dataclass(frozen=True)
class OperatorEvaluator(CellEvaluator):
    """Makes the cells of an operator study; `right` of a training has a 1 per right answer.

    accuracy_items: questions of the word cloze put to each model.
    """

    accuracy_items: int

    def _findings(self, training: ProxyTraining, corpus: PackedCorpus) -> Cell:
        """Which questions of the cloze are answered right, '0110…'."""
        from slm.data.tokenizer import load_tokenizer
        from slm.evaluation import cloze_answers

        items = _questions(self.corpus_folder, self.accuracy_items)
        if not items:
            return {"right": ""}
        tokenizer = load_tokenizer(corpus.tokenizer_path)
        right = cloze_answers(training.model, tokenizer, items, ACCURACY_BATCH_SIZE)
        return {"right": "".join(str(int(each)) for each in right)}


@cache
def _questions(corpus_folder: Path, num_items: int) -> list[ClozeItem]:
    """The questions, made once per process."""
    from slm.data import PackedCorpus
    from slm.data.cloze import build_cloze

    if num_items == 0:
        return []
    return build_cloze(PackedCorpus.open(corpus_folder), num_items, CLOZE_SEED)
