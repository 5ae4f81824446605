"""Read prompt suites from the Hugging Face hub: `suite:NAME:hub`, or `suite:NAME:hub@REVISION` for a given commit.

Only suites whose repository and files are known can be read, and the hub is asked only if the word `hub` is given.
Files in the local cache need no network. The commit is part of every prompt's metadata.

The prompts of GenEval and DPG-Bench lie in their authors' code repositories, and T2I-CompBench is on the hub only in
other layouts: read these from the disk (`diffalign.data.suites`).
"""

from dataclasses import dataclass
from pathlib import Path

from diffalign.data.prompts import PromptRow
from diffalign.data.suites import SUITES, read_suite
from diffalign.errors import DiffalignError
from diffalign.hub import hub_answers

HUB = "hub"


@dataclass(frozen=True)
class OnHub:
    """A dataset repository and the suite's files in it. `folder`: the reader takes their folder, not one file."""

    repository: str
    files: tuple[str, ...]
    folder: bool = False


ON_HUB: dict[str, OnHub] = {
    "partiprompts": OnHub("nateraw/parti-prompts", ("PartiPrompts.tsv",)),
    "hpsv2": OnHub(
        "zhwang/HPDv2",
        tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
        folder=True,
    ),
    # The 500 distinct prompts of the test split, without its images.
    "pickapic": OnHub(
        "yuvalkirstain/pickapic_v1_no_images", ("data/test_unique-00000-of-00001-73a51cbb6488571d.parquet",)
    ),
    "drawbench": OnHub("sayakpaul/drawbench", ("DrawBench Prompts - Sheet1.csv",)),
}


def from_hub(path: str) -> bool:
    """Return whether the PATH of `suite:NAME:PATH` names the hub."""
    return path == HUB or path.startswith(f"{HUB}@")


def fetch(name: str, file: str, revision: str | None) -> Path:
    """Return one file of a suite, from the cache or the hub. Raises DiffalignError naming both and the way out."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    suite = ON_HUB[name]
    try:
        return Path(
            hf_hub_download(
                suite.repository, file, repo_type="dataset", revision=revision, local_files_only=not hub_answers()
            )
        )
    except RevisionNotFoundError as error:
        raise DiffalignError(f"suite {name}: {suite.repository} has no revision {revision!r} on the hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise DiffalignError(
            f"suite {name}: {file} of huggingface.co/datasets/{suite.repository}{at} is not in the local cache, and the hub "
            f"cannot be asked; go online once, or fetch it elsewhere and give prompts=suite:{name}:PATH"
        ) from error


def read_hub_suite(name: str, path: str, unique: bool = True) -> list[PromptRow]:
    """Return the suite's prompts; each has the repository and commit in its metadata. unique: as of `read_suite`.

    Raises DiffalignError for a suite that is not on the hub or cannot be fetched now.
    """
    if name not in ON_HUB:
        if name not in SUITES:
            read_suite(name, Path())  # says what the name should have been
        raise DiffalignError(
            f"prompts=suite:{name}:{path}: no repository of the hub is known to hold it in its own layout; download it and "
            f"give suite:{name}:PATH. From the hub there are {', '.join(ON_HUB)}"
        )
    revision = path.partition("@")[2] or None
    if path.endswith("@"):
        raise DiffalignError(f"prompts=suite:{name}:{path}: a revision belongs after @; leave @ out for the newest")
    suite = ON_HUB[name]
    first = fetch(name, suite.files[0], revision)
    commit = commit_of(first)
    # The other files at the commit of the first, even if the repository changes in between.
    files = [first, *(fetch(name, file, commit) for file in suite.files[1:])]
    rows = read_suite(name, files[0].parent if suite.folder else files[0], unique)
    return [PromptRow(row.prompt, {**row.metadata, "suite": f"{suite.repository}@{commit}"}) for row in rows]


def commit_of(path: Path) -> str:
    """Return the commit of a cached file, which the cache keeps under snapshots/<commit>/."""
    return path.parts[path.parts.index("snapshots") + 1]
