"""Define the columns of a dataset folder.

    images/part-00000.parquet   one row an image; never rewritten
    conditions/part-00000.parquet   the same for the image that a group's images are edits of, if there is one
    scores/<reward>.parquet     a reward's columns for every image
    groups.parquet              one row a group of images of one prompt

The image columns carry the metadata with which `datasets.load_dataset("parquet", ...)` shows them as images.
"""

import json
from typing import Any, NotRequired, TypedDict

import pyarrow as pa

from diffalign.voting.log import EVERYBODY

_IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_FEATURES = {
    "group_id": {"dtype": "string", "_type": "Value"},
    "index": {"dtype": "int32", "_type": "Value"},
    "image": {"_type": "Image"},
    "generator": {"dtype": "string", "_type": "Value"},
    "seed": {"dtype": "int64", "_type": "Value"},
    "provenance": {"dtype": "string", "_type": "Value"},
}

IMAGES = pa.schema(
    [
        ("group_id", pa.string()),
        ("index", pa.int32()),
        ("image", _IMAGE_TYPE),
        ("generator", pa.string()),
        ("seed", pa.int64()),
        ("provenance", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)

GROUPS = pa.schema(
    [
        ("group_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("preference", pa.list_(pa.float32())),
        ("split", pa.string()),
        ("metadata", pa.string()),
        (
            "members",
            pa.list_(pa.int32()),
        ),  # which images of the group count, where not all do: `preference` is of these
        ("dropped", pa.string()),  # why `diffalign rank` leaves the group out; null: it does not
        # The preference that people gave, a value for every image of the group, NaN for one that they did not judge.
        # Ranking keeps it, whatever it writes into `preference`; null: nobody gave one.
        ("human", pa.list_(pa.float32())),
    ]
)

GROUPS_FILE = "groups.parquet"
CONDITIONS = "conditions"
"""The folder of condition images, with the columns of `IMAGES`: index 0 of a group is what its images were made from."""
HUMAN = EVERYBODY
"""The source, beside the rewards, by which a dataset can be ranked where people gave preferences."""


class GroupRow(TypedDict):
    """A row of groups.parquet, its metadata as a dict. `preference` has a value for each image that counts.

    human: the preference that people gave, with a value for each image. `write_groups` takes `preference` where a row lacks
    the key.
    """

    group_id: str
    prompt_id: str
    prompt: str
    preference: list[float] | None
    split: str
    metadata: dict[str, Any]
    members: NotRequired[list[int] | None]
    dropped: NotRequired[str | None]
    human: NotRequired[list[float] | None]


def with_latents() -> pa.Schema:
    """Return `IMAGES` with the latent that each image was decoded from: float16 bytes in C order, and its shape."""
    features = {
        **_FEATURES,
        "latent": {"dtype": "binary", "_type": "Value"},
        "latent_shape": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    }
    schema = IMAGES.append(pa.field("latent", pa.binary())).append(pa.field("latent_shape", pa.list_(pa.int32())))
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def score_schema(columns: tuple[str, ...], made_by: dict[str, Any]) -> pa.Schema:
    """Return the columns of a score file: group_id, index, a float32 for every reward column, and why a value is NaN.

    made_by: the `provenance` of the reward, kept in the schema's metadata.
    """
    metadata = {"diffalign": json.dumps(made_by, sort_keys=True)}
    return pa.schema(
        [
            ("group_id", pa.string()),
            ("index", pa.int32()),
            *((c, pa.float32()) for c in columns),
            ("reason", pa.string()),
        ],
        metadata=metadata,
    )
