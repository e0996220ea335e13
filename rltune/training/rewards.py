"""From an experiment's rewards section to rewards and their mixture."""

import statistics
from collections.abc import Mapping
from pathlib import Path

import torch

from rltune.config.experiment import RunConfig
from rltune.config.sections import RewardConfig, TrustConfig
from rltune.errors import UserError
from rltune.redaction import holds_secret, is_secret_name
from rltune.rewards.base import REWARDS, Reward, compares_group
from rltune.rewards.mixture import RAW, Calibration, Mixture, Shape
from rltune.rewards.own import build_own, check_own, own_card
from rltune.rewards.references import reference_features
from rltune.rewards.scalarise import SCALARISATIONS, Scalarisation
from rltune.rewards.scale import score_of
from rltune.rewards.trust import Trust, fit_trust
from rltune.rewards.wrappers import Frugal, Negate, Relative

FILE_OPTIONS = frozenset({"weights", "head", "vocab"})
"""Options of registered rewards that are paths of files."""
FOLDER_OPTIONS = frozenset({"model", "clip"})
"""Those that are folders, or names of published models."""
PICTURES = "images"
"""The one that is files of pictures, or a folder of them."""


def build_rewards(config: RunConfig, judges: tuple[str, ...], device: torch.device) -> dict[str, Reward]:
    """Return the rewards of an experiment and the rewards among its judges, by name, on ``device``.

    Args:
        config: The experiment.
        judges: Names of rewards that are only measured, with their default options.
        device: Where they run.

    Raises:
        UserError: An option has a value that the reward does not take, or a reward of the user's own does not import.
        RunError: Weights are not on this machine.
    """
    sections = dict(config.rewards) | {name: RewardConfig() for name in judges if name not in config.rewards}
    return {name: build_reward(name, section).to(device) for name, section in sections.items()}


def build_reward(name: str, section: RewardConfig) -> Reward:
    """Return one reward with the wrappers that its section asks for.

    Raises:
        UserError: As ``build_rewards``.
        RunError: Weights are not on this machine.
    """
    kind = section.reward or name
    reward = build_own(name, kind, section.options) if is_own(name, section) else REWARDS.build(kind, section.options)
    words = section.relative
    if words.positive is not None and words.negative is not None:
        reward = Relative(reward, positive=words.positive, negative=words.negative, k=words.k)
    if section.negate:
        reward = Negate(reward)
    if reward.sees_group:
        return reward
    return Frugal(reward, name=name, micro_batch=section.micro_batch)


def check_reward(name: str, section: RewardConfig, *, needs_gradient: bool) -> None:
    """Check what can be known of a reward before weights are loaded.

    Raises:
        UserError: A name or an option is unknown, a reward of the user's own does not import, or has no gradient where
            it carries weight and the estimator needs one.
    """
    kind = section.reward or name
    for option, value in section.options.items():
        if isinstance(value, str) and (is_secret_name(option) or holds_secret(value)):
            raise UserError(
                f"rewards.{name}.options.{option}: looks like a secret, and settings are written into the run folder "
                "and beside every exported LoRA; name an environment variable in its place, and let the code read that"
            )
    if not is_own(name, section):
        REWARDS.check(kind, section.options)
        return
    check_own(name, kind, section.options)
    if not own_card(name, kind).is_differentiable and needs_gradient and section.weight > 0:
        raise UserError(
            f"rewards.{name}: {kind} says that it has no gradient, and the estimator backpropagates rewards; give it "
            "weight 0 to watch it only, or take an estimator that needs none: see 'rltune estimators'"
        )


def try_reward(name: str, section: RewardConfig) -> None:
    """Build a reward that needs nothing fetched, and look for the files of others, before a run starts.

    Raises:
        UserError: An option has a value that the reward does not take, or names a file that is not there.
        RunError: What ships with rltune is not there.
    """
    kind = section.reward or name
    if is_own(name, section):
        return  # it may need what is on the nodes alone
    for option in FILE_OPTIONS & section.options.keys():
        given = section.options[option]
        if isinstance(given, str) and not Path(given).is_file():
            raise UserError(f"rewards.{name}.options.{option}: no such file, got {given!r}; give the path of one")
    for option in FOLDER_OPTIONS & section.options.keys():
        given = section.options[option]
        if isinstance(given, str) and given.startswith((".", "/")) and not Path(given).is_dir():
            raise UserError(f"rewards.{name}.options.{option}: no such folder, got {given!r}; give that of a model")
    if REWARDS.card(kind).weights:
        return  # loading takes long, or is not possible here
    try:
        REWARDS.build(kind, section.options)
    except UserError as error:
        raise UserError(f"rewards.{name}.options: {error}") from error
    _shape(name, section, build_reward(name, section), num_pixels=1)


def is_own(name: str, section: RewardConfig) -> bool:
    """Return whether a reward is the user's own, ``module:name``."""
    return ":" in (section.reward or name)


def licence_of(name: str, section: RewardConfig) -> str:
    """Return the licence of the weights that a reward reads; empty where it reads none, or nothing is known of them."""
    kind = section.reward or name
    if is_own(name, section) or kind not in REWARDS.names():
        return ""
    card = REWARDS.card(kind)
    return card.licence if card.has_licence else ""


def compares_images(name: str, section: RewardConfig) -> bool:
    """Return whether a reward compares the images of a prompt with one another; loads no weights.

    Raises:
        UserError: Its name is unknown, or it is the user's own and does not import.
    """
    kind = section.reward or name
    return bool(own_card(name, kind).sees_group) if is_own(name, section) else compares_group(kind)


def build_mixture(
    config: RunConfig,
    rewards: Mapping[str, Reward],
    calibration: Mapping[str, Calibration],
    device: torch.device,
    *,
    num_pixels: int = 1,
) -> Mixture:
    """Return the number that an experiment trains on.

    Args:
        config: The experiment.
        rewards: By name.
        calibration: Of every reward.
        device: Where references for trust are looked at.
        num_pixels: Of an image, which a target in kilobytes is about.

    Raises:
        UserError: A target is no number that its reward can be reported with; trust is asked for in a reward that has
            no features, or its references cannot be read.
        RunError: A reward gives the same score to every base image.
    """
    sections = config.rewards
    units = {name: calibration[name] for name in sections}
    # in their own unit, but with the values, which a win rate compares with
    units |= {
        name: Calibration(RAW.mean, RAW.std, unit.values)
        for name, unit in units.items()
        if not sections[name].standardise
    }
    return Mixture(
        {name: rewards[name] for name in sections},
        config.weights,
        units,
        shapes={name: _shape(name, section, rewards[name], num_pixels) for name, section in sections.items()},
        trusts={
            name: _trust(name, section.trust, section.trust.reference, rewards[name], device)
            for name, section in sections.items()
            if section.trust.reference is not None and section.weight > 0
        },
        scalarise=_scalarisation(config),
        images_per_prompt=config.prompts.images_per_prompt,
    )


def odd_targets(mixture: Mixture) -> list[str]:
    """Say of every target that the base model's images stand all on one side of, since it may be in another unit."""
    said = []
    for name, shape in mixture.shapes.items():
        values = mixture.calibration[name].values if name in mixture.calibration else ()
        if shape.loss == "linear" or mixture.weights[name] == 0 or not values:
            continue
        if min(values) >= shape.target:
            gain = "no image gains by more" if shape.loss == "hinge" else "training goes down to it"
            said.append(f"rewards.{name}.target: all {len(values)} images of the base model reach it already, {gain}")
        elif max(values) < shape.target:
            spread = statistics.pstdev(values)
            far = (
                f", the best is {(shape.target - max(values)) / spread:.1f} standard deviations below" if spread else ""
            )
            said.append(f"rewards.{name}.target: none of {len(values)} images of the base model reaches it{far}")
    return said


def _shape(name: str, section: RewardConfig, reward: Reward, num_pixels: int) -> Shape:
    """Return what is trained on; the target is given in the unit that is reported, and used in that of the score."""
    if section.target is None:
        return Shape(section.loss)
    try:
        return Shape(section.loss, score_of(reward, section.target, num_pixels=num_pixels))
    except UserError as error:
        raise UserError(f"rewards.{name}.target: {error}") from error


def _scalarisation(config: RunConfig) -> Scalarisation:
    mixture = config.mixture
    options = {"ideal": mixture.ideal, "rho": mixture.rho} if mixture.method == "chebyshev" else {}
    return SCALARISATIONS[mixture.method](**options)


def _trust(name: str, trust: TrustConfig, reference: str, reward: Reward, device: torch.device) -> Trust:
    try:
        features_ND = reference_features(reward, reference, device)
        return fit_trust(features_ND.cpu(), slope=trust.slope, offset=trust.offset, ceiling=trust.ceiling)
    except (UserError, ValueError) as error:
        raise UserError(f"rewards.{name}.trust: {error}") from error
