"""Rotary fields of ``config.json`` in both spellings of Hugging Face transformers."""

from typing import Any

from tl_loops.errors import CheckpointError
from tl_loops.families.base import Released, checked

_LLAMA3 = {
    "factor": "NTK_by_parts_factor",
    "low_freq_factor": "NTK_by_parts_low_freq_factor",
    "high_freq_factor": "NTK_by_parts_high_freq_factor",
    "original_max_position_embeddings": "NTK_original_ctx_len",
}


def rotary_fields(released: Released) -> dict[str, Any]:
    """Base and frequency scaling from ``rope_theta`` and ``rope_scaling`` or ``rope_parameters``.

    Scaling of type ``"llama3"`` becomes TransformerLens's ``NTK_by_parts_*`` fields, ``"linear"``
    becomes ``rotary_scaling_factor``.

    Raises:
        CheckpointError: The base is missing, the two spellings disagree, or the scaling is of
            another type.
    """
    parameters = _mapping(released, "rope_parameters")
    scaling = _mapping(released, "rope_scaling")
    bases = {
        key: checked(key, value, float)
        for key, value in (
            ("rope_theta", released.get("rope_theta")),
            ("rope_parameters.rope_theta", parameters.pop("rope_theta", None)),
            ("rope_scaling.rope_theta", scaling.pop("rope_theta", None)),
        )
        if value is not None
    }
    if not bases:
        raise CheckpointError(
            "the required field 'rope_theta' (or 'rope_theta' inside 'rope_parameters') is missing"
        )
    if len(set(bases.values())) > 1:
        shown = ", ".join(f"{key} = {value:g}" for key, value in bases.items())
        raise CheckpointError(f"the rotary base is given twice with different values: {shown}")
    if parameters and scaling and _standard(parameters) != _standard(scaling):
        raise CheckpointError("'rope_parameters' and 'rope_scaling' disagree; remove one of them")
    key, given = ("rope_parameters", parameters) if parameters else ("rope_scaling", scaling)
    return {"rotary_base": next(iter(bases.values())), **_scaling_fields(key, given)}


def _scaling_fields(key: str, given: dict[str, Any]) -> dict[str, Any]:
    if not given:
        return {}
    kind = _standard(given).get("rope_type")
    if kind is None:
        raise CheckpointError(f"{key!r} has no 'rope_type': {given!r}")
    if kind == "default":
        return {}
    if kind not in ("linear", "llama3"):
        raise CheckpointError(
            f"{key!r} has rope_type {kind!r}, which is not implemented; "
            "expected 'default', 'linear' or 'llama3'"
        )
    if kind == "linear":
        return {"rotary_scaling_factor": _scaling_value(key, given, "factor")}
    fields: dict[str, Any] = {"use_NTK_by_parts_rope": True}
    for name, target in _LLAMA3.items():
        fields[target] = _scaling_value(key, given, name)
    low, high = (fields[f"NTK_by_parts_{end}_freq_factor"] for end in ("low", "high"))
    if high <= low:
        raise CheckpointError(
            f"'{key}.high_freq_factor' = {high:g} must be above '{key}.low_freq_factor' = {low:g}"
        )
    fields["NTK_original_ctx_len"] = int(fields["NTK_original_ctx_len"])
    return fields


def _scaling_value(key: str, given: dict[str, Any], name: str) -> float:
    if given.get(name) is None:
        raise CheckpointError(f"the required field {name!r} inside {key!r} is missing")
    value = checked(f"{key}.{name}", given[name], float)
    if value == 0:
        raise CheckpointError(f"'{key}.{name}' must be above 0")
    return value


def _mapping(released: Released, key: str) -> dict[str, Any]:
    value = released.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict) or any(isinstance(inner, dict) for inner in value.values()):
        raise CheckpointError(
            f"{key!r} must be a flat mapping (one rotary embedding for all layers), found {value!r}"
        )
    return dict(value)


def _standard(given: dict[str, Any]) -> dict[str, Any]:
    """With the older name of ``rope_type`` replaced; where both are given, ``rope_type`` counts."""
    older = {"rope_type": given["type"]} if given.get("type") is not None else {}
    newer = {key: value for key, value in given.items() if key != "type" and value is not None}
    return {**older, **newer}
