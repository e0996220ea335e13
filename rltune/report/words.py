"""What a run is about, in words: the question, the setup, and what settings are called."""

from collections.abc import Sequence
from math import floor, log10
from typing import Any

from rltune.config.conditions import condition_in_words
from rltune.config.distributions import in_words
from rltune.report.gather import Gathered

SHORT_NAMES = {
    "estimator.k": "K",
    "estimator.name": "estimator",
    "optim.lr": "learning rate",
    "mixture.method": "mixture",
}
LONGEST = 24
"""Letters of a name in a drawing."""


def setting_name(path: str) -> str:
    """Return what a setting is called beside a plot."""
    parts = path.split(".")
    if parts[0] == "rewards" and parts[-1] == "weight":
        return f"weight of {'.'.join(parts[1:-1])}"
    return SHORT_NAMES.get(path, " ".join(parts[-2:] if parts[-1] in ("name", "steps") else parts[-1:]))


def fitted(text: str, longest: int = LONGEST) -> str:
    """Return a name cut to what a drawing has room for."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def shown_value(value: Any) -> str:
    """Return a setting's value, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def gain_and_half(gain: float, half: float | None) -> str:
    """Return a gain with as many digits as its interval lets one read."""
    if half is None or half <= 0:
        return f"{gain:+.3g}"
    decimals = max(1 - floor(log10(half)), 0)
    return f"{gain:+.{decimals}f} \N{PLUS-MINUS SIGN} {half:.{decimals}f}"


def probability(value: float | None) -> str:
    """Return a probability that was estimated by draws, too few to tell 0.999 from 1."""
    return "" if value is None else ">0.99" if value > 0.99 else "<0.01" if value < 0.01 else f"{value:.2f}"


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence has them."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def question(run: Gathered) -> str:
    """Return what the run was to find out."""
    config, objectives = run.experiment.shared, run.objectives
    ways = [f"{'higher' if run.is_better_up(name) else 'lower'} {name}" for name in objectives]
    if not run.experiment.is_searched:
        return f"What do these settings gain over {config.model.base} in {listed(objectives)}?"
    aim = f"{listed(ways)}, none at the cost of another" if len(ways) > 1 else ways[0]
    kept = f", while {constraints}" if (constraints := listed(_constraints(run))) else ""
    return f"Which settings align {config.model.base} best, for {aim}{kept}?"


def setup(run: Gathered) -> list[tuple[str, str]]:
    """Return the setup, a fact a line: what it is, and the fact."""
    experiment = run.experiment
    config = max(experiment.kinds, key=lambda kind: kind.num_rounds)
    space, optim, evaluate = experiment.space, config.optim, config.evaluate

    def said(path: str, value: Any) -> str:
        return "searched" if path in space else shown_value(value)

    trained_on = [
        f"{name} (weight {said(f'rewards.{name}.weight', row.weight)})" for name, row in config.rewards.items()
    ]
    k = f", K {said('estimator.k', config.estimator.k)}" if config.estimator.k is not None else ""
    ended = sum(result.trial != "000" for result in run.results)
    a_trial = f"{said('optim.steps', optim.steps)} steps of {said('optim.batch', optim.batch)} images"
    facts = [
        ("base model", config.model.base + (f", {config.task}" if config.task != "text_to_image" else "")),
        (
            "trained on" if config.num_rounds else "rewards",
            f"{', '.join(trained_on)}; mixture {said('mixture.method', config.mixture.method)}",
        ),
        *([("estimator", f"{said('estimator.name', config.estimator.name)}{k}")] if config.num_rounds else []),
        ("a trial", a_trial if config.num_rounds else "words alone, nothing is trained"),
        ("searched", "; ".join(_searched(run)) or "nothing"),
        ("search", f"{config.search.sampler}, {ended} of {experiment.num_trials} trials ended"),
        ("evaluated on", f"{evaluate.prompts} held-out prompts, {evaluate.images_per_prompt} images each"),
        ("judges", f"{', '.join(evaluate.judges) or 'none'}; no training sees them"),
        ("constraints", "; ".join(_constraints(run)) or "none"),
    ]
    return facts if experiment.is_searched else [fact for fact in facts if fact[0] not in ("search", "searched")]


def measured_on(run: Gathered) -> str:
    """Return what the numbers of the front were measured on, and what that makes of them."""
    front, num = run.front, run.front.num_prompts
    if front.fresh is None:
        luck = "the best of many are so by luck too" if front.num_candidates > 1 else "few they are"
        return f"Measured on the {num} prompts that trials were chosen by: {luck}."
    if front.fresh.num_reused:
        return (
            f"Members were measured again with fresh noise, on the {num} prompts that they had been chosen by: "
            "luck with prompts stays in."
        )
    return f"Members were measured again on {num} prompts, and noise, that no trial was chosen by."


def volume(run: Gathered) -> str:
    """Return the hypervolume in a sentence."""
    front, fresh = run.front, run.front.fresh
    half = f" \N{PLUS-MINUS SIGN} {fresh.half_width:.2g}" if fresh and fresh.half_width is not None else ""
    null = "the base model alone has 1"
    if fresh and fresh.half_width_without_effect is not None:
        null = f"without any effect it would be 1 \N{PLUS-MINUS SIGN} {fresh.half_width_without_effect:.2g}"
    claimed = fresh.search_hypervolume if fresh else None
    luck = "" if claimed is None else f" The search itself claimed {claimed:.4g}."
    return f"Hypervolume {front.hypervolume:.4g}{half}, in units of the base model's spread; {null}.{luck}"


def _searched(run: Gathered) -> list[str]:
    space, weights = run.experiment.space, run.experiment.simplex_paths
    rows = [
        f"{path}: {in_words(distribution)} {condition_in_words(distribution)}".strip()
        for path, distribution in space.items()
        if path not in weights
    ]
    return rows + ([f"{', '.join(weights)}: weights that sum to 1"] if weights else [])


def _constraints(run: Gathered) -> list[str]:
    rows = []
    for name, bound in run.experiment.shared.constraints.items():
        parts = [
            f"at least {bound.min_ratio_to_base:g} of the base model's" if bound.min_ratio_to_base is not None else "",
            f"at least {bound.min:g}" if bound.min is not None else "",
            f"at most {bound.max:g}" if bound.max is not None else "",
        ]
        rows.append(f"{name} is {' and '.join(part for part in parts if part)}")
    return rows
