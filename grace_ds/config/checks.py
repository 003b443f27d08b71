"""Check a configuration beyond what OmegaConf does: strict types, choices, ranges, and keys that exclude each other.

OmegaConf would convert ``true`` to 1, 5 to "5" and "1_0" to 10, which is hardly ever intended.  Here a value is accepted
unchanged or refused, with its path and what is expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from grace_ds import recipes, registry
from grace_ds.config.schema import GraceConfig
from grace_ds.errors import ConfigError

_LARGEST = 2**53  # whole numbers below it are exact in every JSON reader
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", list: "a list of texts"}

_CHOICES: dict[str, Callable[[], Sequence[str]]] = {  # called at the check: plugins add names
    "recipe": lambda: (recipes.AUTO, *recipes.names()),
    "mode": lambda: ("train", "shadow"),
    "weights": lambda: ("none", "inverse_probability"),
    "comm": lambda: ("auto", *registry.transports.names()),
    "refresh.cadence": lambda: ("adaptive", "fixed"),
    "collect.reduction": lambda: ("mean", "sum"),
    "graph.backend": lambda: ("auto", *registry.backends.names()),
    "graph.tier": lambda: ("auto", "exact", "clustered"),
    "graph.executor": lambda: ("ring", "dask"),
    "selection.objective": lambda: registry.objectives.names(),
    "selection.shares": lambda: ("keep", "floor", "free", "adapt"),
    "checkpoint.on_missing_state": lambda: ("rebuild", "error"),
    "checkpoint.on_damaged_state": lambda: ("rebuild", "error"),
    "checkpoint.on_failed_save": lambda: ("warn", "error"),
}

_RANGES: list[tuple[str, Callable[[float], bool], Sequence[str]]] = [  # what is allowed, its test, and the keys
    ("in (0, 1]", lambda x: 0 < x <= 1, ("budget", "refresh.max_overhead", "refresh.probe_share", "collect.share")),
    ("in (0, 1]", lambda x: 0 < x <= 1, ("graph.recall", "graph.decay", "guard.clean_share")),
    ("in [0, 1)", lambda x: 0 <= x < 1, ("graph.sketch_share", "graph.hidden_share", "graph.drift")),
    ("in [0, 1)", lambda x: 0 <= x < 1, ("selection.explore", "selection.audit")),
    ("in (0, 1)", lambda x: 0 < x < 1, ("guard.confidence",)),
    ("above 0", lambda x: x > 0, ("max_repeats", "refresh.timeout_seconds")),
    ("above 0, so that one weak neighbour does not decide", lambda x: x > 0, ("graph.shrink",)),
    ("0 or more", lambda x: x >= 0, ("seed",)),
    ("1 or more", lambda x: x >= 1, ("refresh.interval_steps",)),
    ("8 or more", lambda x: x >= 8, ("features.max_tokens",)),
    ("0 (automatic) or a number of samples", lambda x: x >= 0, ("window",)),
    ("0 (unknown) or more", lambda x: x >= 0, ("total_steps",)),
    ("-1 (after the first interval), 0 or more", lambda x: x >= -1, ("start_step",)),
    ("-1 (automatic) or more", lambda x: x >= -1, ("refresh.slack_steps",)),
    ("between 0 and 1: of a source's share of the window", lambda x: 0 <= x <= 1, ("selection.least_share",)),
    ("1 or more: of a source's share of the window", lambda x: x >= 1, ("selection.most_share",)),
    ("-1 (none) or a token id", lambda x: x >= -1, ("features.separator",)),
    ("between 8 and 8192", lambda x: 8 <= x <= 8192, ("collect.dim",)),
    ("between 1 and 64", lambda x: 1 <= x <= 64, ("collect.rank", "graph.hops")),
    ("between 8 and 4096", lambda x: 8 <= x <= 4096, ("features.dim",)),
    ("between 1 and 256", lambda x: 1 <= x <= 256, ("graph.k",)),
    ("0 (automatic) to 1024", lambda x: 0 <= x <= 1024, ("features.threads",)),
    ("0 (automatic) to 1048576", lambda x: 0 <= x <= 1 << 20, ("graph.clusters",)),
    ("0 (automatic) to 8", lambda x: 0 <= x <= 8, ("graph.overlap",)),
]


def check_types(given: Mapping[Any, Any], section: Any, path: str) -> None:
    """Compare a block with a section of the schema, including its subsections.

    Args:
        given: keys and values as read.  Texts with an interpolation (``${...}``) pass, as their values are not known yet.
        section: an instance of the section's dataclass.
        path: of the section, for messages.

    Raises:
        ConfigError: an unknown key, or a value of another type.
    """
    hints = typing.get_type_hints(type(section))
    for key, value in given.items():
        if key not in hints:
            cure = _nearest(key, list(hints)) or f"; known here: {', '.join(hints)}"
            raise ConfigError(f"{path}.{key} = {value!r} is no key of grace_ds{cure}")
        inner = getattr(section, key)
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, Mapping):
                known = ", ".join(f.name for f in dataclasses.fields(inner))
                raise ConfigError(f"{path}.{key} = {value!r} must be an object with keys among: {known}")
            check_types(value, inner, f"{path}.{key}")
        elif not (isinstance(value, str) and "${" in value):
            _check_value(value, hints[key], f"{path}.{key}")


def _check_value(value: Any, hint: Any, path: str) -> None:
    kinds = typing.get_args(hint) if typing.get_origin(hint) is not list else ()
    if type(None) in kinds and value is None:
        return
    kind = next((member for member in kinds if member is not type(None)), typing.get_origin(hint) or hint)
    if not _is(value, kind):
        also = " or null" if type(None) in kinds else ""
        raise ConfigError(f"{path} = {value!r} has the wrong type: it must be {_WORDS[kind]}{also}")


def _is(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(_is(item, str) for item in value)
    if kind is str:
        return isinstance(value, str) and value != "???"  # OmegaConf's marker of a missing value
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if not isinstance(value, int | float) or (kind is int and not isinstance(value, int)):
        return False
    return math.isfinite(value) and (kind is float or abs(value) < _LARGEST)


def check_values(config: GraceConfig, path: str) -> None:
    """Check every rule that a type cannot express.

    Raises:
        ConfigError: naming the key, its value and what is allowed.
    """
    for key, names in _CHOICES.items():
        value, allowed = attrgetter(key)(config), names()
        if value not in allowed:
            raise ConfigError(f"{path}.{key} = {value!r}; it must be one of {', '.join(allowed)}{_nearest(value, allowed)}")
    for allowed_range, test, keys in _RANGES:
        for key in keys:
            number = attrgetter(key)(config)
            if not test(number):
                raise ConfigError(f"{path}.{key} = {number}; it must be {allowed_range}")
    _check_combinations(config, path)


def _nearest(word: Any, known: Sequence[str]) -> str:
    """Return ``; did you mean '…'?`` if a known word is near, else nothing."""
    near = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_combinations(config: GraceConfig, path: str) -> None:
    first = max(config.start_step, config.warmup_steps)
    if config.stop_step and config.stop_step <= first:
        raise ConfigError(
            f"{path}.stop_step = {config.stop_step} is not after the first choice at step {first}; raise it, or 0 for never"
        )
    learned = config.graph.sketch_share + config.graph.hidden_share
    if learned >= 1:
        raise ConfigError(f"{path}.graph: sketch_share + hidden_share = {learned:g} leaves nothing to content; keep it below 1")
    if config.selection.explore + config.selection.audit >= 1:
        total = config.selection.explore + config.selection.audit
        raise ConfigError(f"{path}.selection: explore + audit = {total:g} leaves no slot for the coreset; keep it below 1")
    if recipes.recipe(config.recipe).content and not config.features.enabled and config.replay is None:
        needs = "only recipe: uniform does without content features"
        raise ConfigError(f"{path}.recipe = {config.recipe!r} with features.enabled: false; {needs}, or turn them on")
    uses = recipes.recipe(config.recipe).uses
    if config.selection.shares == "adapt":
        if config.selection.sources is None:
            raise ConfigError(f"{path}.selection.shares = 'adapt' without selection.sources; name each sample's source there")
        if "gradients" not in config.parts:
            raise ConfigError(
                f"{path}.selection.shares = 'adapt' learns from influences, which recipe {config.recipe!r} does not measure; "
                "set recipe: grace and leave gradients out of ablate, or set shares: keep"
            )
    odd = [part for part in config.ablate if part not in uses]
    if odd:
        known = f"it can do without {', '.join(sorted(uses))}" if uses else "it has no parts to leave out"
        near = _nearest(odd[0], sorted(uses))
        raise ConfigError(f"{path}.ablate names {odd[0]!r}, which is no part of recipe {config.recipe!r}: {known}{near}")
    if config.covers and not config.features.enabled:
        raise ConfigError(f"{path}.selection.objective = 'facility_location' needs the content graph; set features.enabled: true")
    if config.replay is not None and config.mode == "shadow":
        raise ConfigError(f"{path}: replay and mode: shadow exclude each other (shadow leaves the batches alone); drop one")
    if not config.collect.layers:
        raise ConfigError(f"{path}.collect.layers is empty; name at least one pattern, or ['auto']")
