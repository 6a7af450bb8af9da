"""Optuna's own samplers as searches of our space: NSGA-II and TPE, the baselines to beat.

An Optuna study in memory is told every candidate of a history, then its sampler is asked for the
next one. Study and sampler are new for each proposal, and the sampler is seeded for it: resuming is
replaying here, too.

Samplers see parameters, so `Encoding` writes every genotype as the same ones. Of a conditional
encoding, which has a third block type only where a genotype does, Optuna's NSGA-II would inherit
little: it crosses the parameters that all trials have, and draws the rest at random.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import NSGAIISampler, TPESampler
from optuna.trial import TrialState

from search.genotype import ALONE, BlockType, Genotype, Rules, format_ratio, parse_ratio
from search.history import History
from search.space import SearchSpace

if TYPE_CHECKING:
    from search.evolution import EvolutionConfig

# Much of what a sampler asks for once it has converged is known.
ATTEMPTS = 20
# Under which NSGA-II finds the generation of a trial.
GENERATION_KEY = NSGAIISampler._get_generation_key()


def propose_sampled(
    space: SearchSpace,
    config: EvolutionConfig,
    rng: random.Random,
    target_ms: float,
    history: History,
) -> Genotype | None:
    """The new genotype that Optuna's sampler asks for after `history`.

    None while the sampler has too little to go by, and when all that it asks for is known. The time
    grows with the history, by some tenths of a millisecond for each candidate.
    """
    num_scored = sum(candidate.is_scored for candidate in history)
    if num_scored < (config.population_size if config.algorithm == "nsga2" else 1):
        return None
    encoding = Encoding(space.rules)
    study = told_study(encoding, config, rng.getrandbits(32), target_ms, history)
    for _ in range(ATTEMPTS):
        # None is finished, and TPE keeps away from those that run.
        trial = study.ask(encoding.distributions)
        genotype = encoding.decode(trial.params)
        if genotype is not None and space.allows(genotype):
            genotype = space.canonical(genotype)
            if genotype not in history:
                return genotype
    return None


def told_study(
    encoding: Encoding,
    config: EvolutionConfig,
    sampler_seed: int,
    target_ms: float,
    history: History,
) -> optuna.Study:
    """A study in memory whose trials are the candidates that did not fail, in order.

    Values are the objectives after the last rung, the constraint is latency over the target. The
    infeasible, which have no values, are pruned; those that wait for a score are running.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * len(config.objectives))
    num_scored = 0
    for candidate in history:
        if candidate.state == "failed":
            continue
        state, values, attributes = TrialState.RUNNING, None, {}
        if candidate.is_scored:
            state, values = TrialState.COMPLETE, candidate.point(config.objectives, -1)
            # What Optuna gives to trials that it asks for one after another.
            attributes[GENERATION_KEY] = num_scored // config.population_size
            num_scored += 1
        elif candidate.state == "infeasible":
            state = TrialState.PRUNED
        latency_ms = candidate.latency_ms
        over_ms = math.inf if latency_ms is None else latency_ms - target_ms
        if state is TrialState.PRUNED and over_ms <= 0:
            # It misses a limit under another workload, the history does not say by how much.
            over_ms = math.inf
        study.add_trial(
            optuna.create_trial(
                state=state,
                values=values,
                params=encoding.encode(candidate.genotype),
                distributions=encoding.distributions,
                system_attrs=attributes,
                constraints={"latency_ms": over_ms},
            )
        )
    if config.algorithm == "tpe":
        study.sampler = TPESampler(multivariate=True, n_startup_trials=0, seed=sampler_seed)
        return study
    study.sampler = NSGAIISampler(population_size=config.population_size, seed=sampler_seed)
    # Selects parents from the first generation on. Optuna would from the last, recursively.
    for generation in range(1, num_scored // config.population_size + 1):
        study.sampler.get_parent_population(study, generation)
    return study


class Encoding:
    """A genotype as parameters whose number and ranges are the same for the whole space.

    'A.ratio', 'A.partner', 'A.mixer' and 'A.ffns_per_mixer' make block type A; the partner is the
    first mixer of two, and counts only where the ratio has one. The first block is an A, 'block_1'
    and so on are the types of those that follow, as long as 'num_operators' has room for them. Then
    there are the factors of the whole model. What there is no choice of is no parameter.
    """

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.types = tuple(string.ascii_uppercase[: min(rules.max_block_types, rules.max_blocks)])
        has_partners = any(ratio != ALONE for ratio in rules.ratios)
        choices: dict[str, Sequence[Any]] = {}
        for name in self.types:
            choices[f"{name}.ratio"] = [format_ratio(ratio) for ratio in rules.ratios]
            choices[f"{name}.partner"] = rules.mixers if has_partners else rules.mixers[:1]
            choices[f"{name}.mixer"] = rules.mixers
            choices[f"{name}.ffns_per_mixer"] = rules.ffns_per_mixer
        choices |= {f"block_{place}": self.types for place in range(1, rules.max_blocks)}
        choices |= {"ffn": rules.ffns, "meta_tokens": rules.meta_tokens, "width": rules.widths}
        self.fixed = {name: values[0] for name, values in choices.items() if len(values) == 1}
        self.distributions: dict[str, BaseDistribution] = {
            "num_operators": IntDistribution(1, rules.max_operators)
        }
        self.distributions |= {
            name: CategoricalDistribution(values)
            for name, values in choices.items()
            if len(values) > 1
        }

    def encode(self, genotype: Genotype) -> dict[str, Any]:
        """Parameters that stand for the genotype.

        Those that say nothing of it go on as it does: its pattern and its block types once more.
        """
        blocks, pattern = genotype.blocks, genotype.pattern
        values: dict[str, Any] = {
            "num_operators": len(genotype.operators),
            "ffn": genotype.ffn,
            "meta_tokens": genotype.meta_tokens,
            "width": genotype.width,
        }
        for place, name in enumerate(self.types):
            block = blocks[place % len(blocks)]
            values |= {
                f"{name}.ratio": format_ratio(block.ratio),
                f"{name}.partner": block.mixers[0],
                f"{name}.mixer": block.mixers[-1],
                f"{name}.ffns_per_mixer": block.ffns_per_mixer,
            }
        for place in range(1, self.rules.max_blocks):
            values[f"block_{place}"] = self.types[pattern[place % len(pattern)]]
        return {name: values[name] for name in self.distributions}

    def decode(self, parameters: Mapping[str, Any]) -> Genotype | None:
        """The genotype that the parameters stand for: not canonical, maybe outside the space.

        None if there is no room for its first block.
        """
        values = {**self.fixed, **parameters}
        types = {name: self._decode_block(name, values) for name in self.types}
        names = [self.types[0]]
        names += [values[f"block_{place}"] for place in range(1, self.rules.max_blocks)]
        sequence: list[BlockType] = []
        room = values["num_operators"]
        for name in names:
            room -= types[name].num_operators
            if room < 0:
                break
            sequence.append(types[name])
        if not sequence:
            return None
        return Genotype.from_sequence(
            sequence, values["ffn"], values["meta_tokens"], values["width"]
        )

    @staticmethod
    def _decode_block(name: str, values: Mapping[str, Any]) -> BlockType:
        partner, mixer = values[f"{name}.partner"], values[f"{name}.mixer"]
        ratio = parse_ratio(values[f"{name}.ratio"])
        ffns_per_mixer = values[f"{name}.ffns_per_mixer"]
        if ratio == ALONE or partner == mixer:
            return BlockType((mixer,), ALONE, ffns_per_mixer)
        return BlockType((partner, mixer), ratio, ffns_per_mixer)
