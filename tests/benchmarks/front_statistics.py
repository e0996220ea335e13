"""What a front claims against what is true: hypervolume, its interval, and P(non-dominated), on simulated sweeps.

A sweep is as experiments/mix.yaml's: twelve trials and the base model, measured on P prompts by the search, which picks
the members, and on P others, by which they are reported. True gains are even in +-effect standard deviations of the
base model, in each objective by itself. Gains of single prompts scatter around them by 0.6 of these, half as much
again in common to all objectives of a prompt: normal, or skewed with a long tail (exponential).

    python tests/benchmarks/front_statistics.py --sweeps 2000

``search`` and ``fresh`` are the hypervolumes that search and report claim, ``placed`` is the true one with every place
given to the trial that led there in the search, and ``true`` that of the members' true values. An interval covers where
``placed`` lies in it; ``true`` is never below ``placed``. The last table is of two sweeps on the same prompts, which
have a scatter of 0.4 in common, and of the difference of their hypervolumes as ``rltune compare`` has it.
"""

import argparse
from dataclasses import dataclass
from itertools import product

import numpy as np

from rltune.intervals import difference
from rltune.pareto.fresh import fresh_volume, prob_non_dominated, volume_as_chosen, volume_by_prompt
from rltune.pareto.front import Array, non_dominated
from rltune.pareto.hypervolume import hypervolume

NUM_TRIALS, NOISE, SHARED = 12, 0.6, 0.4
BINS = ((0.0, 0.5), (0.5, 0.85), (0.85, 1.01))


@dataclass(frozen=True)
class Sweep:
    """A simulated sweep's members: what they are, what chose them, and what they are reported by."""

    true_ND: Array
    search_ND: Array
    fresh_PND: Array


def simulate(
    rng: np.random.Generator,
    *,
    num_prompts: int,
    num_objectives: int,
    effect: float,
    is_skewed: bool = False,
    shared: Array | float = 0.0,
) -> Sweep:
    """Return the members of a sweep, gains over the base model in its standard deviations.

    ``shared`` is what prompts do to every trial, ``(2, P, 1, D)``: of the search's prompts and of the fresh ones.
    """
    true_ND = effect * rng.uniform(-1, 1, (NUM_TRIALS + 1, num_objectives))
    shape = (2, num_prompts, NUM_TRIALS + 1, num_objectives)
    draw = (lambda size: rng.exponential(size=size) - 1) if is_skewed else rng.standard_normal
    noise = NOISE * draw(shape) + NOISE / 2 * draw((*shape[:3], 1))
    noise += shared
    true_ND[0], noise[:, :, 0] = 0.0, 0.0  # the base model
    search_PND, fresh_PND = true_ND + noise
    search_ND = search_PND.mean(axis=0)
    members = np.flatnonzero(non_dominated(search_ND))
    return Sweep(true_ND[members], search_ND[members], fresh_PND[:, members])


def volumes(sweeps: list[Sweep]) -> str:
    """Return a row of the table of hypervolumes."""
    zero = np.zeros(sweeps[0].true_ND.shape[1])
    rows = []
    for sweep in sweeps:
        found = fresh_volume(1 + sweep.search_ND, sweep.fresh_PND)
        placed = float(volume_as_chosen(1 + sweep.search_ND, 1 + sweep.true_ND[None])[0])
        true = hypervolume(1 + sweep.true_ND, zero)
        assert found.half_width is not None
        covered = [abs(found.value - volume) <= found.half_width for volume in (placed, true)]
        rows.append((true, placed, hypervolume(1 + sweep.search_ND, zero), found.value, found.half_width, *covered))
    *means, placed_is_covered, true_is_covered = np.mean(rows, axis=0)
    return " | ".join([*(f"{mean:.2f}" for mean in means), f"{placed_is_covered:.1%}", f"{true_is_covered:.1%}"])


def places(sweeps: list[Sweep]) -> str:
    """Return a row of the table of P(non-dominated): what was said on average, and how often it was so."""
    said, so = [], []
    for sweep in sweeps:
        said += prob_non_dominated(sweep.fresh_PND).tolist()
        so += non_dominated(sweep.true_ND).tolist()
    said_N, so_N = np.array(said), np.array(so)
    cells = []
    for low, high in BINS:
        is_in = (low <= said_N) & (said_N < high)
        cells.append(f"{said_N[is_in].mean():.2f} | {so_N[is_in].mean():.2f} | {is_in.mean():.0%}")
    return " | ".join(cells)


def differences(rng: np.random.Generator, num_pairs: int, effects: tuple[float, float], about: dict[str, int]) -> str:
    """Return a row of the table of differences between two sweeps on the same prompts."""
    rows = []
    for _ in range(num_pairs):
        shared = SHARED * rng.standard_normal((2, about["num_prompts"], 1, about["num_objectives"]))
        pair = [simulate(rng, **about, effect=effect, shared=shared) for effect in effects]
        volumes = [volume_by_prompt(1 + sweep.search_ND, sweep.fresh_PND)[None] for sweep in pair]
        placed = [float(volume_as_chosen(1 + sweep.search_ND, 1 + sweep.true_ND[None])[0]) for sweep in pair]
        value, half = difference(*volumes)
        assert half is not None
        error = value - (placed[0] - placed[1])
        rows.append((error, half, abs(error) <= half))
    bias, half, covered = np.mean(rows, axis=0)
    return f"{bias:+.3f} | {half:.2f} | {covered:.1%}"


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    settings = list(product((2, 3), (8, 16, 64), (0.0, 0.25, 0.5, 1.0), (False, True)))
    print(
        "objectives | prompts | effect | noise | true | placed | search | fresh | half width | covered | true covered"
    )
    kept = []
    for num_objectives, num_prompts, effect, is_skewed in settings:
        rng = np.random.default_rng(asked.seed)
        about = {"num_prompts": num_prompts, "num_objectives": num_objectives}
        sweeps = [simulate(rng, **about, effect=effect, is_skewed=is_skewed) for _ in range(asked.sweeps)]
        name = f"{num_objectives} | {num_prompts} | {effect} | {'skewed' if is_skewed else 'normal'}"
        print(f"{name} | {volumes(sweeps)}", flush=True)
        if effect and not is_skewed:
            kept.append((name, sweeps[:500]))
    print("\nobjectives | prompts | effect | noise | said | so | share | said | so | share | said | so | share")
    for name, sweeps in kept:
        print(f"{name} | {places(sweeps)}", flush=True)
    print("\nobjectives | prompts | effects | bias of the difference | half width | covered")
    for num_objectives, num_prompts, effects in product((2, 3), (8, 16, 64), ((0.0, 0.0), (0.5, 0.5), (0.5, 1.0))):
        about = {"num_prompts": num_prompts, "num_objectives": num_objectives}
        row = differences(np.random.default_rng(asked.seed), asked.sweeps, effects, about)
        print(f"{num_objectives} | {num_prompts} | {effects[0]}, {effects[1]} | {row}", flush=True)


if __name__ == "__main__":
    main()
