"""Load a checked :class:`GraceConfig` from a DeepSpeed config: defaults ← file ← ds_config block ← dotlist.

Every mistake is reported before training, with the path of the key, its value, the nearest known name and the cure.  All
ranks read the same config, so all ranks raise the same error.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grace_ds import registry
from grace_ds.config import schema
from grace_ds.config.block_file import GIVEN
from grace_ds.config.checks import check_types, check_values
from grace_ds.config.interpolated import check_interpolations, hidden, marked, unresolved
from grace_ds.config.schema import GraceConfig, Plain
from grace_ds.errors import ConfigError
from grace_ds.utils.files import write_atomic
from grace_ds.utils.reading import SETTINGS, read_text, read_yaml

log = logging.getLogger("grace_ds")

HOME = "data_efficiency.data_sampling.grace"
ALIAS = "grace_ds"
_ABSENT = object()  # marks a missing key, as opposed to null


def read_ds_config(config: str | Path | Mapping[str, Any]) -> Plain:
    """Return a DeepSpeed config as a dict: the mapping itself (not copied), or the content of a JSON file.

    Raises:
        ConfigError: the file is missing or no JSON object.
    """
    if isinstance(config, Mapping):
        return cast(Plain, config)
    import hjson  # DeepSpeed's own reader, so that a config with comments is accepted here too

    try:
        loaded = hjson.loads(read_text(config, SETTINGS), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise ConfigError(f"DeepSpeed config {str(config)!r} cannot be read ({error.strerror}); give an existing file") from error
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"DeepSpeed config {str(config)!r} is no JSON: line {error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # no text, too deep, or a key given twice
        raise ConfigError(f"DeepSpeed config {str(config)!r} is no JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"DeepSpeed config {str(config)!r} holds a {type(loaded).__name__}; it must be a JSON object")
    return loaded


def find_block(ds_config: Mapping[str, Any]) -> tuple[str, Plain] | None:
    """Return the path of the grace block of a DeepSpeed config, and the block; None if there is none.

    Raises:
        ConfigError: a block at a wrong place, two blocks, or ``data_efficiency``/``data_sampling`` not enabled.
    """
    misplaced = [path for path in _paths_of_blocks(ds_config) if path not in (HOME, ALIAS)]
    if misplaced:
        raise ConfigError(
            f"a grace block stands at {misplaced[0]!r}, where DeepSpeed ignores it; move it to {HOME!r} (or top-level {ALIAS!r})"
        )
    home, alias = _get(ds_config, HOME, _ABSENT), ds_config.get(ALIAS, _ABSENT)
    if home is not _ABSENT and alias is not _ABSENT:
        raise ConfigError(f"both {HOME!r} and {ALIAS!r} are given; keep one")
    if home is _ABSENT and alias is _ABSENT:
        return None
    path, block = (HOME, home) if home is not _ABSENT else (ALIAS, alias)
    if not isinstance(block, Mapping):
        raise ConfigError(f'{path} is {block!r}; it must be an object, such as {{"enabled": true, "budget": 0.2}}')
    if path == HOME and block.get("enabled", True):
        for parent in ("data_efficiency", "data_efficiency.data_sampling"):
            if _get(ds_config, f"{parent}.enabled") is not True:
                raise ConfigError(f"{HOME} is on but {parent}.enabled is not true; set it to true, or grace.enabled to false")
    return path, dict(block)


def block_of(ds_config: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> tuple[str, Plain] | None:
    """Return the grace block of a job and its path: that of its DeepSpeed config, or the file of ``grace-ds run --grace``.

    Raises:
        ConfigError: as :func:`find_block`, or both are given.
    """
    found, given = find_block(ds_config), environ.get(GIVEN)
    if not given:
        return found
    if found is not None:
        raise ConfigError(f"the DeepSpeed config holds a grace block ({found[0]}) and --grace {given} gives another; keep one")
    return given, {"file": given}


def load_config(block: Mapping[str, Any], path: str = HOME, dotlist: Sequence[str] = ()) -> GraceConfig:
    """Return the checked configuration: the defaults, overridden by a block, overridden by ``dotlist`` (``a.b=c``).

    Args:
        block: the user's keys.  The key ``file``, if given, names a YAML file whose keys the block overrides.
        path: of the block in the config, for messages.
        dotlist: assignments that override the block.

    Raises:
        ConfigError: unknown key, wrong type or impossible combination.
    """
    given = dict(block)
    layers: list[Any] = []
    try:
        if "file" in given:
            layers.append(_read_file(given.pop("file"), path))
        layers += [OmegaConf.create(given), OmegaConf.from_dotlist(list(dotlist))]
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {_first_line(error)}") from error
    try:
        return _checked(layers, path)
    except ConfigError as error:
        raise ConfigError(hidden(str(error), [OmegaConf.to_container(layer, resolve=False) for layer in layers])) from None


def _checked(layers: Sequence[Any], path: str) -> GraceConfig:
    """Return the layers merged over the defaults, the last one on top, and checked.

    Raises:
        ConfigError: as :func:`load_config`; the message may hold values of interpolations.
    """
    merged = OmegaConf.structured(GraceConfig)
    plain = [cast(Plain, OmegaConf.to_container(layer, resolve=False)) for layer in layers]
    asked: Any = next((raw["resolvers"] for raw in reversed(plain) if "resolvers" in raw), [])
    check_interpolations(plain, asked if isinstance(asked, list) else [], path)
    for raw in plain:
        _rename(raw, path)
        _refuse_removed(raw, path)
        check_types(raw, GraceConfig(), path)
        try:
            merged = OmegaConf.merge(merged, OmegaConf.create(raw))
            config = cast(GraceConfig, OmegaConf.to_object(merged))
        except (OmegaConfBaseException, RecursionError) as error:  # the types are checked, so only interpolations can fail
            key = getattr(error, "full_key", "") or "an interpolation"
            raise ConfigError(f"{path}.{key} = {_get(raw, key)!r} cannot be resolved: {_first_line(error)}") from None
    # Check the types again, for the values of interpolations.
    check_types(dataclasses.asdict(config), GraceConfig(), path)
    _mark(config, OmegaConf.to_container(merged, resolve=False))
    if config.recipe in schema.RENAMED_RECIPES:
        new = schema.RENAMED_RECIPES[config.recipe]
        log.warning("%s.recipe = %r is now called %r; the old name goes with the next version", path, config.recipe, new)
        config.recipe = new
    registry.load_plugins(config.plugins, path)
    check_values(config, path)
    return config


def _mark(section: Any, raw: Any) -> None:
    """Mark the texts of a section of the schema that are interpolations in ``raw``, for files and messages."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _mark(value, raw[field.name])
        else:
            setattr(section, field.name, marked(value, raw[field.name]))


def _rename(raw: Plain, path: str) -> None:
    """Move values under old keys of ``raw`` to the new keys, in place, with a warning.

    Raises:
        ConfigError: both the old and the new key are given.
    """
    for old, new in schema.RENAMED.items():
        parent, _, key = old.rpartition(".")
        block = _get(raw, parent, None) if parent else raw
        if not isinstance(block, dict) or key not in block:
            continue
        name = new.rpartition(".")[2]
        if name in block:
            raise ConfigError(f"{path}.{old} is now called {new}, and both are given; keep {new}")
        log.warning("%s.%s is now called %s; the old name goes with the next version", path, old, new)
        block[name] = block.pop(key)


def _refuse_removed(raw: Plain, path: str) -> None:
    """Refuse keys that no longer exist.

    Raises:
        ConfigError: such a key is given; with what to do instead.
    """
    for key, cure in schema.REMOVED.items():
        if _get(raw, key, _ABSENT) is not _ABSENT:
            raise ConfigError(f"{path}.{key} is gone: {cure}")


def refuse_curriculum(ds_config: Mapping[str, Any]) -> None:
    """Refuse DeepSpeed's curriculum sampler, which replaces every other sampler.

    Raises:
        ConfigError: curriculum learning is enabled.
    """
    for path in ("data_efficiency.data_sampling.curriculum_learning", "curriculum_learning"):
        if _enabled(ds_config, path):
            raise ConfigError(
                f"{path}.enabled is true: DeepSpeed's curriculum replaces the data sampler, so a coreset would never be "
                f"trained on; turn one of the two off"
            )


def refuse_over_stream(config: GraceConfig) -> None:
    """Refuse what a dataset must be read by index for, over one that can only be iterated over.

    Raises:
        ConfigError: naming the first such key.
    """
    selection = config.selection
    asked = {
        "mode: shadow": config.mode == "shadow",
        "replay": config.replay is not None,
        "selection.include": selection.include is not None,
        "selection.exclude": selection.exclude is not None,
        "selection.sources": selection.sources is not None,
        "features.cache_dir": config.features.cache_dir is not None,
        "features.precomputed": config.features.precomputed is not None,
    }
    for key, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"{key} needs a dataset that can be read by index, and the training data are iterable; leave it out, or "
                "materialise the dataset"
            )


def write_resolved(config: GraceConfig, directory: str | Path) -> Path:
    """Write ``grace_resolved.yaml`` into ``directory`` (made if missing) and return its path.  For one rank only.

    Interpolations are written as they were given, because their values may be secrets; only the owner can read the file.
    """
    target = Path(directory) / "grace_resolved.yaml"
    tree = unresolved(dataclasses.asdict(config))
    write_atomic(target, OmegaConf.to_yaml(OmegaConf.create(tree)).encode(), private=True)
    return target


def _get(tree: Mapping[str, Any], path: str, default: Any = None) -> Any:
    node: Any = tree
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node


def _enabled(ds_config: Mapping[str, Any], path: str) -> bool:
    section = _get(ds_config, path)
    return isinstance(section, Mapping) and bool(section.get("enabled", False))


def _paths_of_blocks(node: Any, prefix: str = "") -> list[str]:
    """Return the paths of all keys that can only be a grace block, at any depth."""
    paths: list[str] = []
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{prefix}{key}"
            if key in ("grace", "grace_ds"):
                paths.append(path)
            else:
                paths += _paths_of_blocks(value, path + ".")
    return paths


def _read_file(file: Any, path: str) -> DictConfig:
    """Read the YAML file that a block names.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    try:
        if not isinstance(file, str):
            raise TypeError("it must be a path")
        loaded = OmegaConf.create(read_yaml(file))
    except (OSError, OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}.file = {file!r} cannot be read: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}.file holds no mapping of keys to values; write it as YAML keys")
    return loaded


def _without_repeats(pairs: list[tuple[str, Any]]) -> Plain:
    """Return an object of the JSON file; refuse a key that is given twice, as DeepSpeed does."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {twice[0]!r} is given twice; keep one")
    return dict(pairs)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
