"""Read the prompt suites that come with questions or explanations for a judge, each in its authors' own layout.

geneval2     geneval2_data.jsonl: prompt, atom_count, vqa_list, skills (Kamath et al. 2025)
dpgbench     the folder dpg_bench: prompts/*.txt and dpg_bench.csv; or a folder of .txt files alone (Hu et al. 2024)
unigenbench  a csv of its data/: prompt_en and sub_dims_en, or prompt_zh and sub_dims_zh (Wang et al. 2025)
wise         a folder with three files *_verified.json, the first release's three files, or one such file (Niu et al. 2025)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.data.prompts import PromptRow
from diffalign.data.tables import read_rows, read_text
from diffalign.errors import DiffalignError
from diffalign.files.parse import parse_json
from diffalign.files.paths import inside, own_files

WISE_FIRST = ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json")
TESTPOINTS = {"en": ("Testpoints", "Testpoint Description"), "zh": ("考点", "考点对应描述")}


def read_geneval2(path: Path) -> list[PromptRow]:
    """Return the prompts with `atom_count`, `vqa_list` and `skills` as the file has them; the tag is the atom count."""
    rows = []
    for where, row in read_rows(path):
        asked, skills = row.get("vqa_list"), row.get("skills")
        if not isinstance(asked, list) or not isinstance(skills, list) or len(asked) != len(skills) or not asked:
            raise DiffalignError(
                f"{where}: vqa_list and skills must be lists of equal length, as in geneval2_data.jsonl"
            )
        facts = {"tag": str(_cell(row, "atom_count", where)), "vqa_list": asked, "skills": skills}
        rows.append(PromptRow(_prompt(row, "prompt", where), facts))
    return rows


def read_dpgbench(path: Path) -> list[PromptRow]:
    """Return the prompts by item; where dpg_bench.csv is in the folder, each with its questions.

    metadata: item, and of the csv `questions` ([question, "Yes"]), `proposition_ids`, `dependencies` (ids of the questions
    that must be answered with yes first; 0: none) and `categories`.
    """
    texts = path / "prompts" if (path / "prompts").is_dir() else path
    files = own_files(texts, "*.txt") if texts.is_dir() else []
    if not files:
        raise DiffalignError(f"suite folder {texts}: it holds no *.txt")
    listed = inside(path, "dpg_bench.csv")
    asked = _propositions(listed) if listed.is_file() else {}
    rows = []
    for file in files:
        if asked and file.stem not in asked:
            raise DiffalignError(f"{listed}: no question for {file.name}; take both from one release")
        rows.append(PromptRow(" ".join(read_text(file).split()), {"item": file.stem, **asked.get(file.stem, {})}))
    return rows


def _propositions(path: Path) -> dict[str, dict[str, list[Any]]]:
    """Return item -> its questions, their ids, what they depend on, and their categories."""
    found: dict[str, dict[str, list[Any]]] = {}
    for where, row in read_rows(path):
        facts = found.setdefault(
            _text(row, "item_id", where),
            {"questions": [], "proposition_ids": [], "dependencies": [], "categories": []},
        )
        try:
            number = int(_text(row, "proposition_id", where))
            parents = [int(part) for part in _text(row, "dependency", where).split(",")]
        except ValueError as error:
            raise DiffalignError(f"{where}: proposition_id and dependency must be whole numbers ({error})") from error
        facts["questions"].append([_text(row, "question_natural_language", where), "Yes"])
        facts["proposition_ids"].append(number)
        facts["dependencies"].append(parents)
        # "entity - whole (car)" is of the category "entity - whole".
        facts["categories"].append(_text(row, "tuple", where).partition("(")[0].strip())
    return found


def read_unigenbench(path: Path) -> list[PromptRow]:
    """Return the prompts with `testpoints` and `descriptions`, lists of equal length; the tag is the primary theme."""
    rows = []
    for where, row in read_rows(path):
        language = next((one for one in TESTPOINTS if f"prompt_{one}" in row), None)
        if language is None:
            raise DiffalignError(f"{where}: no column prompt_en or prompt_zh; it has {', '.join(map(str, row))}")
        try:
            facts = parse_json(_text(row, f"sub_dims_{language}", where))
            points, described = (facts[name] for name in TESTPOINTS[language])
        except (ValueError, LookupError, TypeError) as error:
            raise DiffalignError(
                f"{where}: sub_dims_{language} holds no testpoints ({error}); mend this cell"
            ) from error
        if not isinstance(points, list) or not isinstance(described, list) or len(points) != len(described):
            raise DiffalignError(f"{where}: testpoints and their descriptions must be lists of equal length")
        theme = facts.get("Primary Categories") or facts.get("一级垂类") or ""
        metadata = {"tag": str(theme), "testpoints": [*map(str, points)], "descriptions": [*map(str, described)]}
        rows.append(PromptRow(_prompt(row, f"prompt_{language}", where), metadata))
    return rows


def read_wise(path: Path) -> list[PromptRow]:
    """Return the prompts with `explanation`; the tag is the category."""
    files = [path]
    if path.is_dir():
        files = own_files(path, "*_verified.json") or [inside(path, name) for name in WISE_FIRST]
    rows = []
    for file in files:
        for where, row in read_rows(file):
            facts = {"tag": _text(row, "Category", where), "explanation": _text(row, "Explanation", where)}
            rows.append(PromptRow(_prompt(row, "Prompt", where), facts))
    return rows


def _cell(row: Mapping[str, Any], name: str, where: str) -> Any:
    if row.get(name) is None:
        raise DiffalignError(f"{where}: no {name!r}; it has {', '.join(map(str, row))}")
    return row[name]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    return str(_cell(row, name, where)).strip()


def _prompt(row: Mapping[str, Any], name: str, where: str) -> str:
    text = _cell(row, name, where)
    if not isinstance(text, str) or not text.strip():
        raise DiffalignError(f"{where}: {name} is no text")
    return text.strip()
