"""Read GenEval's facts (tag, include, exclude) as people store them, and say what is wrong with them."""

from typing import Any

from diffalign.files.parse import parse_json

Facts = dict[str, Any]
KEYS = ("tag", "include", "exclude")


def geneval_facts(row: Facts) -> Facts:
    """Return GenEval's facts of a table's row, also from JSON text in a cell or in a column `metadata`.

    Nulls are dropped: parquet fills every key that another row of the table has.
    """
    packed = _unpacked(row.get("metadata"))
    facts = dict(packed) if isinstance(packed, dict) else {}
    facts |= {key: _unpacked(row[key]) for key in KEYS if row.get(key) is not None}
    return dict(_without_nulls(facts))


def fault_of_facts(facts: Facts) -> str:
    """Return why GenEval cannot use these facts, "" if it can."""
    include, exclude = facts.get("include"), facts.get("exclude") or []
    if not include:
        return "no GenEval metadata (include)"
    for name, clauses in (("include", include), ("exclude", exclude)):
        if not isinstance(clauses, list):
            return f"GenEval metadata: {name} is no list"
        for i, clause in enumerate(clauses):
            fault = _fault_of_clause(clause, i)
            if fault:
                return f"GenEval metadata: {name}[{i}]: {fault}"
    return ""


def _fault_of_clause(clause: Any, number: int) -> str:
    if not isinstance(clause, dict):
        return "no object"
    if not isinstance(clause.get("class"), str):
        return "no class"
    count = clause.get("count")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        return f"count {count!r} is no whole number of 1 or more"
    if "color" in clause and not isinstance(clause["color"], str):
        return f"color {clause['color']!r} is no text"
    place = clause.get("position")
    if "position" in clause:
        if not isinstance(place, list | tuple) or len(place) != 2 or not isinstance(place[0], str):
            return f"position {place!r} is not [relation, number of a clause]"
        if isinstance(place[1], bool) or not isinstance(place[1], int) or not 0 <= place[1] < number:
            return f"position {place!r} names no clause before this one"
    return ""


def _unpacked(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return parse_json(value)
        except ValueError:
            return value
    return value


def _without_nulls(value: Any) -> Any:
    """Return the value without keys that are null, at any depth."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
