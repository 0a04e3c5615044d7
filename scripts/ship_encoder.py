"""Copy a run's encoder into the package, with the config, metrics and commands of the run.

    python scripts/ship_encoder.py RUN NAME

It becomes `selfray/NAME`, in `selfray/weights/NAME`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import load_file

from selfray.data.dataset import write_atomically
from selfray.models.encoder_directory import DESCRIPTION, GOLDEN, save_encoder
from selfray.models.published import SHIPPED, load_encoder

COMMAND = "scripts/train_shipped_encoder.sh"
_EVERY = 10


def thinned(metrics: Path) -> str:
    """Every probe and every tenth step of a run's metrics: the package need not carry the rest."""
    lines = metrics.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    kept = [r["kind"] != "step" or r["step"] % _EVERY == 0 or r["step"] == 1 for r in records]
    return "".join(line for line, keep in zip(lines, kept, strict=True) if keep)


def main() -> None:
    """Copy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    arguments = parser.parse_args()
    run, target = arguments.run, SHIPPED / arguments.name
    card = json.loads((run / "encoder" / DESCRIPTION).read_text())
    for noted in ("position_interpolation", GOLDEN):  # are written anew, and are no recipe
        card.pop(noted, None)
    encoder = load_encoder(str(run))
    head = load_file(run / "encoder" / "dino_head.safetensors")
    save_encoder(
        encoder.model,
        target,
        mean=encoder.mean,
        std=encoder.std,
        card={**card, "licence": "MIT", "command": COMMAND},
        heads={"dino_head": head},
    )
    write_atomically(target / "metrics.jsonl", thinned(run / "metrics.jsonl").encode())
    config = json.loads((run / "config.json").read_text())
    config["data"] = [Path(path).name for path in config["data"]]
    write_atomically(target / "run_config.json", json.dumps(config, indent=2).encode())
    environment = json.loads((run / "environment.json").read_text())
    kept = ("selfray", "python", "torch", "threads", "git_commit", "data_fingerprints")
    text = json.dumps({key: environment[key] for key in kept}, indent=2)
    write_atomically(target / "run_environment.json", text.encode())
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"wrote {target.name}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
