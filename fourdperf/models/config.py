"""Configs of models: frozen dataclasses of plain values, checked when made, stored as JSON with the weights."""

import dataclasses
from collections.abc import Mapping, Sequence


class BaseConfig:
    """What configs share: construction from, and conversion to, plain values."""

    @classmethod
    def from_dict(cls, fields: Mapping):
        """The inverse of `to_dict`; raises ValueError for missing and unknown fields."""
        return from_fields(cls, fields)

    def to_dict(self) -> dict:
        """Plain numbers, strings, lists and dictionaries, fit for JSON."""
        return to_fields(self)


def to_fields(config: object) -> dict:
    """Plain numbers, strings, lists and dictionaries, fit for JSON."""

    def plain(items):
        return {name: list(value) if isinstance(value, tuple) else value for name, value in items}

    return dataclasses.asdict(config, dict_factory=plain)


def from_fields(cls: type, fields: Mapping, prefix: str = ""):
    """A config of class `cls`; raises ValueError for missing and unknown fields."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in fields:
        if name not in known:
            raise ValueError(f"{prefix}{name}: no such option; expected {', '.join(known)}")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in fields:
            raise ValueError(f"{prefix}{name}: missing")
    return cls(**fields)


def check_int(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_choices(config: object, choices: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for the first field of `choices` whose value is none of its own."""
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(config, name)!r}")


def int_tuple(name: str, values: object, *lengths: int) -> tuple[int, ...]:
    """`values` as a tuple; raises ValueError unless it is a sequence of so many positive integers."""
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) not in lengths:
        raise ValueError(f"{name}: expected {' or '.join(map(str, lengths))} positive integers, got {values!r}")
    for value in values:
        check_int(name, value)
    return tuple(values)


def set_field(config: object, name: str, value: object) -> None:
    """Assign to a field of a frozen dataclass while it is being made."""
    object.__setattr__(config, name, value)
