"""An experiment while it is read: overrides go in, distributions come out, and every fault is noted with its line."""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rltune.config.conditions import faults_of_conditions
from rltune.config.distributions import (
    Distribution,
    DistributionError,
    Simplex,
    looks_like_distribution,
    parse_distribution,
    show,
)
from rltune.config.kinds import faults_of_kinds
from rltune.config.points import faults_of_points
from rltune.config.schema import belongs_to_whole_sweep, node_at
from rltune.config.validation import cut_out, list_or_value
from rltune.config.words import is_leaf
from rltune.config.yamlfile import Path, YamlError, read_yaml
from rltune.errors import Fault

_OVERRIDE = 0
"""Stands for the line of what came from ``--set``."""


@dataclass
class Draft:
    """What is known of an experiment so far."""

    source: str
    raw: dict[str, Any]
    lines: dict[Path, int]
    """Path -> line in the file."""
    space: dict[Path, Distribution] = field(default_factory=dict)
    broken: list[Path] = field(default_factory=list)
    """Where a mapping stands that is no distribution, or one that must not be there, or no number at all."""
    _faults: list[tuple[float, Fault]] = field(default_factory=list)

    def report(self, dotted: str, what: str, remedy: str, line: int | None = None) -> None:
        """Note a fault at ``dotted``; without a line, at the line of the nearest section that has one."""
        path = tuple(re.sub(r"\[(\d+)\]", r".\1", dotted).split("."))
        if line is None:
            prefixes = (path[:depth] for depth in range(len(path), 0, -1))
            line = next((self.lines[prefix] for prefix in prefixes if prefix in self.lines), None)
        place = "--set " if line == _OVERRIDE else f"{self.source}:{line} " if line else ""
        where = place + re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", dotted)
        self._faults.append((math.inf if line is None else line, Fault(where, what, remedy)))

    @property
    def faults(self) -> list[Fault]:
        """Every fault so far, in the order of the file, overrides first."""
        return [fault for _, fault in sorted(self._faults, key=lambda item: item[0])]

    def override(self, assignment: str) -> None:
        """Put ``a.b=value`` in, the value in YAML; sections that are missing are made."""
        dotted, equals, text = assignment.partition("=")
        path = tuple(key.strip() for key in dotted.split("."))
        if not equals or not all(path):
            self.report(assignment, "must be like a.b=value", "write --set optim.lr=1e-3", _OVERRIDE)
            return
        try:
            value, _, _ = read_yaml(text)
        except YamlError as error:
            self.report(dotted, error.what, error.remedy, _OVERRIDE)
            return
        section = self.raw
        for depth, key in enumerate(path[:-1], start=1):
            if section.get(key) is None:
                section[key] = {}
                self.lines[path[:depth]] = _OVERRIDE
            if not isinstance(section[key], dict):
                what = f"{'.'.join(path[:depth])} is not a section, got {show(section[key])}"
                self.report(dotted, what, f"override {'.'.join(path[:depth])} as a whole", _OVERRIDE)
                return
            section = section[key]
        section[path[-1]] = value
        self.lines = {old: line for old, line in self.lines.items() if old[: len(path)] != path} | {path: _OVERRIDE}

    def collect(self, value: Any, path: Path = ()) -> None:
        """Find the distributions at and below ``path``."""
        node = node_at(path)
        if node is None:
            return  # an unknown key, which validation reports
        is_condition_alone = node == {} and isinstance(value, Mapping) and set(value) == {"when"}
        is_distribution = path and (looks_like_distribution(value) or is_condition_alone)
        if (is_leaf(node) and isinstance(value, Mapping)) or is_distribution:
            if is_leaf(node) or node == {}:
                self._add(value, path)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self.collect(item, (*path, key))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                # In a list that stands for one value among others (targets), pydantic blames the list, not the item.
                if "anyOf" not in node and (node == {} or looks_like_distribution(item)):
                    self.collect(item, (*path, str(i)))
        elif node == {} and isinstance(value, float) and not math.isfinite(value):
            self.report(".".join(path), f"must be a finite number, got {show(value)}", "write a number")
            self.broken.append(path)

    def _add(self, value: Mapping[str, Any], path: Path) -> None:
        dotted = ".".join(path)
        if belongs_to_whole_sweep(path):
            self.report(dotted, f"cannot be searched, got {show(value)}", "all trials share it; write one value")
            self.broken.append(path)
            return
        try:
            distribution = parse_distribution(value)
            if isinstance(distribution, Simplex) and (len(path), path[0], path[-1]) != (3, "rewards", "weight"):
                remedy = "only rewards.NAME.weight can be on the simplex"
                raise DistributionError(("simplex",), f"not a reward's weight, got {show(value)}", remedy)
            if distribution.when and list_or_value(self.raw, path) != path:
                what = f"an item of a list cannot come and go, got {show(value['when'])}"
                raise DistributionError(("when",), what, "delete it")
            self.space[path] = distribution
        except DistributionError as error:
            self.report(".".join((*path, *error.key)), error.what, error.remedy)
            self.broken.append(path)

    def check_simplex(self) -> None:
        """Report weights that are not on the simplex while others are."""
        on_simplex = [path for path, distribution in self.space.items() if isinstance(distribution, Simplex)]
        rewards = self.raw.get("rewards")
        if not on_simplex or not isinstance(rewards, Mapping):
            return
        for name, reward in rewards.items():
            path = ("rewards", name, "weight")
            if path not in on_simplex and path not in self.broken:
                weight = reward.get("weight", 1.0) if isinstance(reward, Mapping) else 1.0
                what = f"must be on the simplex like {'.'.join(on_simplex[0])}, got {show(weight)}"
                self.report(".".join(path), what, "write {simplex: true} for every weight or for none")
        if len(rewards) == 1:
            what = "a simplex needs at least two rewards, got one"
            self.report(".".join(on_simplex[0]), what, "write weight: 1.0")

    def check_conditions(self) -> None:
        """Report conditions that can never hold, or are missing; what has one counts as broken."""
        broken = list(self.broken)
        while True:  # what waits for something broken is broken too
            faults = list(faults_of_conditions(self.space, broken))
            if not faults:
                break
            for path, parent, what, remedy in faults:
                if what:
                    where = (*path, "when")
                    line = self.lines.get((*where, ".".join(parent)))
                    self.report(".".join(where), what, remedy, line)
                broken.append(path)
                self.space.pop(path, None)
        for path, what, remedy in [*faults_of_kinds(self.space)]:
            self.report(".".join(path), what, remedy)
            broken.append(path)
            self.space.pop(path, None)
        self.broken = list(dict.fromkeys(broken))

    def check_points(self) -> None:
        """Report points to try first that are not in the space."""
        search = self.raw.get("search")
        points = search.get("points") if isinstance(search, Mapping) else None
        for i, path, what, remedy in faults_of_points(points, self.space, self.broken):
            where = ("search", "points", str(i), *([path] if path else []))
            self.report(".".join(where), what, remedy, self.lines.get(where))

    def without_broken(self) -> dict[str, Any]:
        """Return the values with what is broken cut out; a list goes as a whole, with the distributions in it."""
        data = copy.deepcopy(self.raw)
        self.broken = list(dict.fromkeys(list_or_value(data, path) for path in self.broken))
        cut_out(data, self.broken)
        for cut in self.broken:
            self.space = {path: dist for path, dist in self.space.items() if path[: len(cut)] != cut}
        return data
