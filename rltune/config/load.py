"""An experiment file -> values and a search space, or one error that lists every fault of the file."""

import itertools
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from rltune.config.conditions import active_values, ancestors, first_values, is_active
from rltune.config.distributions import Distribution, Simplex, is_in, show
from rltune.config.draft import Draft
from rltune.config.experiment import Context, RunConfig
from rltune.config.grid import combinations, is_countable
from rltune.config.kinds import KIND, NO_LORA
from rltune.config.model_section import LoraConfig
from rltune.config.rules import Known
from rltune.config.validation import faults_of_run, faults_of_space, replaced
from rltune.config.yamlfile import Path, YamlError, read_yaml, write_yaml
from rltune.errors import ExperimentError, Fault


@dataclass(frozen=True)
class Experiment:
    """A valid experiment: what the user wrote and what of it is searched. ``load_experiment`` makes one."""

    source: str
    """Where it came from, for messages."""
    raw: Mapping[str, Any]
    """The file's content after overrides, distributions as they were written. Not to be changed."""
    space: Mapping[str, Distribution]
    """Dotted path -> distribution, in the file's order; empty if every value is concrete."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Dotted path -> what a setting is that the file leaves open: the base model's own. ``settled`` gives them."""
    lines: Mapping[Path, int] = field(default_factory=dict, compare=False, repr=False)
    """Path -> line in the file, for messages."""

    @property
    def is_searched(self) -> bool:
        """Whether any value is a distribution."""
        return bool(self.space)

    @property
    def grid_values(self) -> Iterator[dict[str, Any]] | None:
        """Every combination of active values, the last setting's varying fastest; None if there are infinitely many."""
        return map(_dotted, combinations(_split(self.space))) if is_countable(self.space) else None

    @property
    def num_trials(self) -> int:
        """Trials to train: ``search.trials``, no more than a grid has, one if nothing is searched."""
        if not self.is_searched:
            return 1
        search = self.shared.search
        grid = self.grid_values if search.sampler == "grid" else None
        return search.trials if grid is None else sum(1 for _ in itertools.islice(grid, search.trials))

    @property
    def simplex_paths(self) -> tuple[str, ...]:
        """Paths of the weights that must sum to one; none or at least two."""
        return tuple(path for path, distribution in self.space.items() if isinstance(distribution, Simplex))

    @property
    def shared(self) -> RunConfig:
        """The run at each distribution's first value: read from it what all trials share (search, resources, ..)."""
        return self.concrete(self.active(self.first))

    @property
    def kinds(self) -> tuple[RunConfig, ...]:
        """The run with every kind of adapter that is searched, and the first values of all else; ``shared`` if none."""
        return tuple(self.corners(("model.adapter",)))

    @property
    def lora(self) -> LoraConfig:
        """The section ``model.lora`` as trials with a LoRA have it; searched settings at their first values."""
        kinds = (kind.model for kind in self.kinds if kind.model.adapter.kind not in NO_LORA)
        return next(kinds, self.shared.model).lora

    @property
    def first(self) -> dict[str, Any]:
        """Each distribution's first value, active or not."""
        return _dotted(first_values(_split(self.space)))

    @property
    def is_conditional(self) -> bool:
        """Whether anything is searched only where something else has a certain value."""
        return any(distribution.when for distribution in self.space.values())

    def active_paths(self, values: Mapping[str, Any]) -> frozenset[str]:
        """Return what is searched where the choices among ``values`` stand as they do."""
        space, known = _split(self.space), _split(values)
        return frozenset(".".join(path) for path in space if is_active(space, path, known))

    def active(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of ``active_paths``, in the order of ``space``."""
        return _dotted(active_values(_split(self.space), _split(values)))

    def has(self, values: Mapping[str, Any]) -> bool:
        """Whether a search of this space could have come to ``values``: for all that is active, and in its ranges."""
        weights = [values.get(path, 0) for path in self.simplex_paths]
        return (
            set(values) == self.active_paths(values)
            and all(is_in(value, self.space[path]) for path, value in values.items())
            and (not weights or math.isclose(sum(weights), 1, abs_tol=1e-6))
        )

    def corners(self, sections: Sequence[str]) -> Iterator[RunConfig]:
        """Yield the run at every combination of ends and options of what is searched in ``sections``, dotted paths.

        Other distributions are at their first values, but for choices that something in these sections depends on.
        """
        prefixes = tuple(f"{section}." for section in sections)
        inside = [path for path in _split(self.space) if f"{'.'.join(path)}.".startswith(prefixes)]
        varied = {".".join(p) for path in inside for p in (path, *ancestors(_split(self.space), path))}
        ends = {
            path: [value for _, value in kind.corners()]
            for path, kind in self.space.items()
            if path in varied and not isinstance(kind, Simplex)
        }
        tried: set[str] = set()
        for combination in itertools.product(*ends.values()):
            values = self.active(self.first | dict(zip(ends, combination, strict=True)))
            if repr(values) not in tried:
                tried.add(repr(values))
                yield self.concrete(values)

    def largest(self, paths: Collection[str]) -> tuple[RunConfig, ...]:
        """Return the run at the greatest number of what is searched among ``paths``, and the first of all else.

        One for every kind of adapter that is searched.
        """
        greatest = dict(self.first)
        for path, kind in self.space.items():
            if path in paths and not isinstance(kind, Simplex):
                numbers = [value for _, value in kind.corners() if isinstance(value, int | float)]
                greatest[path] = max(numbers, default=greatest[path])
        kinds = (config.model.adapter.kind for config in self.kinds)
        own: Iterable[dict[str, Any]] = (
            ({path: kind} for kind in kinds) if (path := ".".join(KIND)) in self.space else ({},)
        )
        return tuple(self.concrete(self.active(greatest | kind)) for kind in own)

    def concrete(self, values: Mapping[str, Any]) -> RunConfig:
        """Return the run with a value for every active distribution, validated like a file without any.

        What is not active is left out, as if the file did not have it.

        Args:
            values: Dotted path -> value, exactly the paths of ``space`` that are active where they have these values.

        Raises:
            ExperimentError: The values do not make a valid run.
            ValueError: A path is missing or too many, or simplex weights do not sum to one.
        """
        expected = self.active_paths(values)
        if set(values) != expected:
            raise ValueError(f"values must be for {sorted(expected)}, got {sorted(values)}")
        weights = [values[path] for path in self.simplex_paths]
        if weights and not math.isclose(sum(weights), 1, abs_tol=1e-6):  # float32 weights sum to within 1e-7 each
            raise ValueError(f"weights on the simplex must sum to 1, got {weights}")
        data = replaced(self.raw, _split(values), _split(self.space))
        context = Context(defaults=self.defaults)
        if clashes := faults_of_run(data, context):
            raise ExperimentError(self.source, [Fault(c.where, c.what, c.remedy) for c in clashes])
        return RunConfig.model_validate(data, context=context)

    def settled(self, defaults: Mapping[str, Any], known: Known | None = None) -> "Experiment":
        """Return the experiment with values for what it leaves open, right everywhere in its space.

        Args:
            defaults: Dotted path -> value.
            known: As for ``load_experiment``.

        Raises:
            ExperimentError: Lists what does not go together with them.
        """
        context = Context(known or Known(), defaults=defaults)
        draft = Draft(self.source, dict(self.raw), dict(self.lines))
        for clash in faults_of_space(self.raw, _split(self.space), context, ()):
            draft.report(clash.where, clash.what, clash.remedy)
        if draft.faults:
            raise ExperimentError(self.source, draft.faults)
        return replace(self, defaults=dict(defaults))

    def to_yaml(self) -> str:
        """Return YAML text that loads as this experiment again, overrides included."""
        return write_yaml(self.raw)


def load_experiment(
    path: str | FilePath, overrides: Sequence[str] = (), known: Known | None = None, *, must_find_files: bool = True
) -> Experiment:
    """Return the experiment in a YAML file.

    Args:
        path: The file.
        overrides: ``a.b=value`` each, the value in YAML; later ones win.
        known: Names that rewards, estimators, judges and samplers are checked against; else any name passes.
        must_find_files: Whether prompt files must be there; a finished run is read without them.

    Raises:
        ExperimentError: Lists every fault of the file, with its line.
    """
    try:
        text = FilePath(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _one_fault(path, "no such file", "check the path") from None
    except IsADirectoryError:
        raise _one_fault(path, "this is a directory", "name a YAML file in it") from None
    except UnicodeDecodeError as error:
        what = f"not UTF-8 text, got the byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise _one_fault(path, what, "save it as UTF-8") from None
    except OSError as error:
        raise _one_fault(path, f"cannot be read ({error.strerror})", "check its permissions") from None
    return parse_experiment(text, str(path), overrides, known, must_find_files=must_find_files)


def parse_experiment(
    text: str | Mapping[str, Any],
    source: str = "experiment",
    overrides: Sequence[str] = (),
    known: Known | None = None,
    *,
    must_find_files: bool = True,
) -> Experiment:
    """Return the experiment in YAML ``text``, or in a mapping, whose faults have no lines.

    ``source`` names it in messages, and it if it has no name.

    Raises:
        ExperimentError: Lists every fault.
    """
    try:
        raw, lines, key_faults = read_yaml(text if isinstance(text, str) else write_yaml(text))
    except YamlError as error:
        place = source if error.line is None else f"{source}:{error.line}"
        raise ExperimentError(source, [Fault(place, error.what, error.remedy)]) from None
    if raw is None:
        raise _one_fault(source, "the file is empty", "write at least: rewards: {aesthetic: {weight: 1.0}}")
    if not isinstance(raw, dict):
        raise _one_fault(source, f"must be a mapping of sections, got {show(raw)}", "write 'section: {key: value}'")
    draft = Draft(source, raw, lines if isinstance(text, str) else {})
    for line, fault in key_faults:
        draft.report(fault.where, fault.what, fault.remedy, line if isinstance(text, str) else None)
    for override in overrides:
        draft.override(override)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", FilePath(source).stem).strip(".-_") or "experiment"
    draft.raw.setdefault("name", stem[:100])
    draft.collect(draft.raw)
    draft.check_simplex()
    draft.check_conditions()
    draft.check_points()
    context = Context(known or Known(), must_find_files=must_find_files)
    data = draft.without_broken()
    for clash in faults_of_space(data, draft.space, context, draft.broken):
        draft.report(clash.where, clash.what, clash.remedy)
    if draft.faults:
        raise ExperimentError(source, draft.faults)
    return Experiment(source, draft.raw, _dotted(draft.space), lines=draft.lines)


def _one_fault(path: str | FilePath, what: str, remedy: str) -> ExperimentError:
    return ExperimentError(str(path), [Fault(str(path), what, remedy)])


def _dotted(values: Mapping[Path, Any]) -> dict[str, Any]:
    return {".".join(path): value for path, value in values.items()}


def _split(values: Mapping[str, Any]) -> dict[Path, Any]:
    return {tuple(path.split(".")): value for path, value in values.items()}
