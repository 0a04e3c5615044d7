"""What is known of encoders, as text: the table of all, and everything of one."""

from __future__ import annotations

from collections.abc import Iterator

from selfray.models.published import ENCODERS_VARIABLE, list_encoders, load_encoder
from selfray.models.vit import ARCHITECTURES


def encoder_table() -> Iterator[str]:
    """One line for each encoder that has a name, and what else can be named."""
    rows = list_encoders()
    width = max(len(row.name) for row in rows)
    yield f"{'name':{width}}  here  input  width  grid   licence, publisher"
    for e in rows:
        grid = "{}×{}".format(*e.grid)
        here = "yes" if e.available else "no"
        yield (
            f"{e.name:{width}}  {here:4}  {e.input_size:5}  {e.width:5}  {grid:5}  "
            f"{e.licence}, {e.publisher}"
        )
    yield (
        "\n`selfray encoders NAME` tells everything about one, and where its files go.\n"
        "Besides: a run directory; a Hugging Face model directory; timm:NAME and xrv:NAME of the\n"
        "libraries timm and torchxrayvision; random:ARCH[/PATCH[@SIZE]], random weights, with ARCH "
        f"one of\n{', '.join(ARCHITECTURES)};\n"
        "in features and evaluate also pixels:pca and pixels:16x16, baselines without a network."
    )


def encoder_details(name: str) -> Iterator[str]:
    """Everything that is known of one encoder.

    Args:
        name: As for `load_encoder`. One without a row in the table is loaded.

    Raises:
        InputError: There is no such encoder, or its files are not whole.
    """
    row = next((row for row in list_encoders() if row.name == name), None)
    if row is None:
        e = load_encoder(name)
        known = {
            "input": f"{e.image_size} × {e.image_size}",
            "features": _features(e.width, e.grid),
            "preprocessing": ", ".join(
                f"{what} {value}"
                for what, value in e.preprocessing.description().items()
                if value is not None
            ),
            "training data": "phantoms"
            if e.synthetic
            else ", ".join(e.training_data) or "not known",
        }
    else:
        known = {
            "publisher": row.publisher,
            "licence": row.licence,
            "input": f"{row.input_size} × {row.input_size}",
            "features": _features(row.width, row.grid),
            "preprocessing": row.preprocessing,
            "training data": ", ".join(row.training_data) or "no radiographs that are known of",
            "files": ", ".join(
                [*row.files, *(f"{file} (optional)" for file in row.optional_files)]
            ),
            "from": row.home,
            "here": "yes" if row.available else "no",
        }
    yield name
    for what, value in known.items():
        yield f"  {what:15}{value}"
    if row is not None and not row.available:
        yield (
            f"\nPut the files into ${ENCODERS_VARIABLE}/{name};\nor into any folder, and name that "
            "folder in place of the encoder;\nor leave them in Hugging Face's cache."
        )


def _features(width: int, grid: tuple[int, int]) -> str:
    return "CLS or pooled [{0}], patches [{0}, {1}, {2}]".format(width, *grid)
