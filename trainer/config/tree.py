"""Config files as trees: read with their bases, merged, overridden, checked, with errors that name key and remedy."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from data_pipeline.errors import ConfigError
from data_pipeline.files import write_atomic
from trainer.config.model import NETWORK_CONFIGS, ModelConfig
from trainer.config.section import Section

SectionT = TypeVar("SectionT", bound=Section)


def save_config(config: Section, path: Path) -> None:
    """Write the resolved tree as YAML, atomically."""
    write_atomic(path, to_yaml(config))


def to_yaml(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_tree(path: Path, *, _seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file merged over its `base:` (a path relative to the file), as a plain dict."""
    path = Path(path).resolve()
    if path in _seen:
        raise ConfigError(f"{path}: `base:` leads back to the file itself; remove the circle.")
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}. The shipped ones are in configs/.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a YAML file in it.") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(tree).__name__}.")
    sections = {str(key): value for key, value in tree.items()}
    base = sections.pop("base", None)
    if base is None:
        return sections
    return merge(read_tree(path.parent / str(base), _seen=(*_seen, path)), sections)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`["train.lr=1e-4", ...]` as a tree. Raises ConfigError for words that are not `key=value`."""
    tree: dict[str, Any] = {}
    for word in overrides:
        key, equals, _ = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(f"argument {word!r} is not of the form section.key=value, such as train.lr=1e-4.")
        try:
            part: Any = OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"argument {word!r} cannot be read: {error}") from None
        tree = laid_over(tree, part)
    return tree


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid upon `under`: sections merge, values and lists are replaced.

    So is a model by one of another name, of which it keeps what all networks have.
    """
    old, new = under.get("model"), over.get("model")
    if isinstance(old, dict) and isinstance(new, dict) and new.get("name") not in (None, old.get("name", "unet")):
        under = under | {"model": {k: v for k, v in old.items() if k in ModelConfig.model_fields}}
    return laid_over(under, over)


def laid_over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The same, of trees that are parts of one: of a model with another name everything is kept."""
    result = dict(under)
    for key, value in over.items():
        old = result.get(key)
        result[key] = laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def validate(schema: type[SectionT], tree: dict[str, Any], *, source: str) -> SectionT:
    """Build `schema` from a tree. Raises ConfigError listing every wrong key with its value and remedy."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(schema, dict(item)) for item in error.errors()]
        raise ConfigError(f"{source}:\n" + "\n".join(f"  {line}" for line in lines)) from None


def _explain(schema: type[Section], item: dict[str, Any]) -> str:
    # Where a value may be of several kinds, pydantic adds the kind to the path: not a key of ours.
    location = [str(part) for part in item["loc"] if not str(part).startswith(("literal[", "constrained-"))]
    network = location.pop(1) if location[:1] == ["model"] and location[1:2] and location[1] in NETWORK_CONFIGS else ""
    path = ".".join(location)
    if item["type"] == "union_tag_invalid":
        return f"{path}.name={item['ctx']['tag']!r}: there is no such network; use {' or '.join(NETWORK_CONFIGS)}."
    if item["type"] == "extra_forbidden":
        known = _known_keys(schema, network, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys here: {', '.join(known)}."
        return f"{path}={item['input']!r}: unknown key; {hint}"
    if item["type"] == "model_type":
        keys = ", ".join(_known_keys(schema, network, location))
        return f"{path}={item['input']!r}: a section is expected, not a value; its keys are {keys}."
    if item["type"] == "tuple_type":
        hint = f": {path}=[{item['input']}]" if isinstance(item["input"], int | float | str) else ""
        return f"{path}={item['input']!r}: a list is expected; write it in brackets, with commas between several{hint}."
    if item["type"] == "missing":
        return f"{path}: missing; set it in the file or as {path}=VALUE."
    if item["type"] == "value_error":
        text = str(item["ctx"]["error"])  # our own validators name key, value and remedy themselves ...
        # ... but those of a section with several places cannot know where it stands.
        return text if not location or f"{location[0]}." in text else f"{path}.{text}"
    return f"{path}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}."


def _known_keys(schema: type[BaseModel], network: str, location: list[str]) -> list[str]:
    """The keys of the section at `location`; below `model` those of the network that is named."""
    if network:
        schema, location = NETWORK_CONFIGS[network], location[1:]
    for part in location:
        field = schema.model_fields.get(part)
        inner = field.annotation if field else None
        models = [t for t in (inner, *get_args(inner)) if isinstance(t, type) and issubclass(t, BaseModel)]
        if not models:
            return []
        schema = models[0]
    return sorted(schema.model_fields)
