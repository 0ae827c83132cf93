"""Which columns of a Parquet file hold the images, their labels and their keys, and what the classes are called."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from engine.errors import ClipmillError

IMAGE_NAMES = ("image", "img", "jpg", "bytes")
LABEL_NAMES = ("label", "labels", "cls", "fine_label")
KEY_NAMES = ("key", "__key__")  # called so to be keys
PERHAPS_KEY_NAMES = ("id", "file_name")


@dataclass(frozen=True)
class Columns:
    """The columns that matter, by name, and their Arrow types: files whose Columns are equal go together."""

    image: str
    label: str | None
    key: str | None
    key_must_be_unique: bool
    class_names: tuple[str, ...]
    types: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def difference(self, other: Columns) -> str:
        fields = [field.name for field in dataclasses.fields(self)]
        return ", ".join(name for name in fields if getattr(self, name) != getattr(other, name)) + " differ"

    def without_key(self) -> Columns:
        note = f'the column "{self.key}" is not unique, so keys are FILE#ROW'
        return dataclasses.replace(self, key=None, notes=(*self.notes, note))


def find_columns(file: str, parquet: pq.ParquetFile) -> Columns:
    """The columns of one file; ClipmillError when it has no image column, or one without a single image."""
    schema = parquet.schema_arrow
    features = _features(schema)
    image = _image(schema, features)
    if image is None:
        kinds = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ClipmillError(
            f"no image column in {file} ({kinds or 'no columns'}): --dataset parquet: needs struct {{bytes, path}} or "
            "binary, called image where there are several; for paths of image files there is --dataset list:FILE"
        )
    if _all_null(parquet, image):
        raise ClipmillError(
            f'the column "{image}" of {file} holds no bytes, at most paths: embed the images for --dataset parquet:'
        )
    label = _label(schema, features)
    key = _first(schema, (*KEY_NAMES, *PERHAPS_KEY_NAMES), lambda kind: is_text(kind) or pa.types.is_integer(kind))
    return Columns(
        image=image,
        label=label,
        key=key,
        key_must_be_unique=key in KEY_NAMES,
        class_names=_class_names(file, schema, features, label),
        types=tuple(f"{name} is {schema.field(name).type}" for name in (image, label, key) if name is not None),
        notes=tuple(
            f'no labels: the column "{field.name}" is {field.type}, neither numbers nor names'
            for field in schema
            if label is None and field.name in LABEL_NAMES
        ),
    )


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What Hugging Face's metadata says of each column: {"image": {"_type": "Image"}, ...}; {} where there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    columns = features.items() if isinstance(features, dict) else ()
    return {name: what for name, what in columns if isinstance(what, dict) and name in schema.names}


def _image(schema: pa.Schema, features: dict[str, Any]) -> str | None:
    called_images = [name for name, what in features.items() if what.get("_type") == "Image"]
    fitting = [field.name for field in schema if _holds_images(field.type)]
    # Of several that are called images, the first by the usual names counts, then the first in the schema.
    by_name = _first(schema, (*_sorted_by(called_images, IMAGE_NAMES), *IMAGE_NAMES), _holds_images)
    return by_name or (fitting[0] if len(fitting) == 1 else None)


def _label(schema: pa.Schema, features: dict[str, Any]) -> str | None:
    class_labels = [name for name, what in features.items() if what.get("_type") == "ClassLabel"]
    return _first(
        schema,
        (*_sorted_by(class_labels, LABEL_NAMES), *LABEL_NAMES),
        lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind) or is_text(kind),
    )


def _class_names(file: str, schema: pa.Schema, features: dict[str, Any], label: str | None) -> tuple[str, ...]:
    names = features.get(label or "", {}).get("names")
    if names is None:
        try:
            names = json.loads((schema.metadata or {})[b"class_names"])
        except (KeyError, ValueError):
            return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ClipmillError(f"the class names in the metadata of {file} are no list of names: see --dataset parquet:")
    if label is not None and is_text(schema.field(label).type):
        return ()  # its own values are the names
    return tuple(names)


def _all_null(parquet: pq.ParquetFile, image: str) -> bool:
    """Whether the file's own statistics say that not one row has bytes."""
    metadata = parquet.metadata
    names = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    index = names.index(f"{image}.bytes" if f"{image}.bytes" in names else image)
    nulls = 0
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(index).statistics
        if statistics is None or not statistics.has_null_count:
            return False
        nulls += statistics.null_count
    return bool(metadata.num_rows and nulls == metadata.num_rows)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _first(schema: pa.Schema, names: Iterable[str], fits: Callable[[pa.DataType], bool]) -> str | None:
    """The first of these columns that is there, only once, and of a type that fits."""
    return next((name for name in names if schema.names.count(name) == 1 and fits(schema.field(name).type)), None)


def _sorted_by(names: list[str], order: tuple[str, ...]) -> list[str]:
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))
