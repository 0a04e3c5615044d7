"""The command line: parse, call one function, print what was written.

Stages are imported inside the functions that call them, so that `selfray --help` imports neither
torch nor any other large library.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from selfray import __version__
from selfray.config import ContrastiveConfig
from selfray.errors import InputError, Interrupted, RunStopped, nearest
from selfray.export import FORMATS
from selfray.field_options import (
    add_fields,
    add_report_fields,
    configured,
    one_of,
    report_config,
)
from selfray.recipes import RECIPES

if TYPE_CHECKING:
    from selfray.evaluate import ReportTask


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose help has the same width everywhere."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, width=100, max_help_position=36
            ),
            **options,
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


@dataclass(frozen=True)
class _Command:
    """A subcommand.

    Attributes:
        summary: One line for `selfray --help`.
        usage: What follows `selfray NAME`.
        add_arguments: Adds them to a parser.
        run: Calls the stage and returns the lines to print.
    """

    summary: str
    usage: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Iterable[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after `selfray`; those of the process when None.

    Returns:
        0 done, 1 the run stopped itself, 2 the input is wrong, 130 interrupted; each with one line
        on stderr. Anything else leaves with its traceback, and so with 1.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    prog = f"selfray {words[0]}" if words and words[0] in COMMANDS else "selfray"
    try:
        _run(words)
    except InputError as error:
        return _fail(prog, str(error), 2)
    except RunStopped as error:
        return _fail(prog, str(error), 1)
    except (Interrupted, KeyboardInterrupt) as interruption:
        return _fail(prog, str(interruption) or "interrupted", 130)
    except BrokenPipeError:
        # The reader of stdout has gone (`| head`). Python flushes once more at exit, and complains.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        place = error.filename2 or error.filename  # the target, where a renaming failed
        number = error.errno or 0
        advice = _OF_WRITING.get(number) or (_OF_PATHS.get(number) if place else None)
        if not advice:
            raise
        return _fail(prog, f"{place or 'writing'}: {error.strerror}. {advice}", 2)
    return 0


def _run(words: Sequence[str]) -> None:
    try:
        command, arguments = parse(words)
        for line in command.run(arguments):
            print(line, flush=True)
    finally:
        sys.stdout.flush()  # what --help wrote, while a broken pipe can still be caught


# What to do about an error of the operating system; those of paths only where one is named, since
# without it they are more likely a defect.
_OF_WRITING = {
    errno.ENOSPC: "Make room there, then repeat the command.",
    errno.EDQUOT: "Make room there, then repeat the command.",
    errno.EFBIG: "Raise the limit of a file's size (`ulimit -f`), or give another file system.",
    errno.EACCES: "Give a path to which you have the rights.",
    errno.EROFS: "Give a path that can be written to.",
    errno.ENAMETOOLONG: "Give a shorter path.",
}
_OF_PATHS = {
    errno.ENOENT: "Give a path in a folder that exists and can be written to.",
    errno.ENOTDIR: "A file stands where a folder must be: give another path.",
    errno.EISDIR: "A folder stands where a file must be: give the path of a file.",
    errno.ENOTEMPTY: "Give an empty folder, or a path where nothing is yet.",
    errno.EPERM: "Give a path to which you have the rights.",
}


def _fail(prog: str, message: str, code: int) -> int:
    print(f"{prog}: {' '.join(message.split())}", file=sys.stderr)
    return code


def parse(words: Sequence[str]) -> tuple[_Command, argparse.Namespace]:
    """Read a command line, and check the recipe and its fields.

    Args:
        words: The words after `selfray`.

    Raises:
        InputError: Names what is wrong and what is allowed.
        SystemExit: With 0, after `--help` or `--version`.
    """
    if not words or words[0] not in COMMANDS:
        top = top_parser()
        top.parse_known_args([word for word in words[:1] if word.startswith("-")])
        if not words:
            raise InputError(f"no command given. {nearest('', COMMANDS)}")
        if words[0].startswith("-"):
            raise InputError(f"no option {words[0]}. `selfray --help` shows all.")
        raise InputError(f"no command is named {words[0]!r}. {nearest(words[0], COMMANDS)}")
    command = COMMANDS[words[0]]
    parser = command_parser(words[0], words[1:])
    arguments, unknown = parser.parse_known_args(list(words[1:]))
    if unknown:
        raise InputError(_unknown_argument(unknown[0], words[0], parser))
    if words[0] == "pretrain":
        arguments.config = configured(arguments)
    return command, arguments


def top_parser() -> argparse.ArgumentParser:
    """The parser of `selfray` itself: its help, and its version."""
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{c.summary}" for name, c in COMMANDS.items())
    parser = _Parser(
        prog="selfray",
        usage="selfray COMMAND ...",
        description="Chest radiographs in, a judged image encoder out.\n\ncommands:\n" + commands,
        epilog="`selfray COMMAND --help` shows the arguments of a command.",
    )
    parser.add_argument("--version", action="version", version=f"selfray {__version__}")
    return parser


def command_parser(name: str, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of one command.

    Args:
        name: A key of `COMMANDS`.
        words: The words after it, by which `pretrain` knows whose values to show in its help.
    """
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"selfray {name}",
        usage=f"selfray {name} {command.usage}",
        description=command.summary + ".",
    )
    command.add_arguments(parser)
    if name == "pretrain":
        add_fields(parser, words)
    return parser


def _unknown_argument(word: str, command: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"one argument too many: {word!r}. `selfray {command} --help` shows the arguments."
    option = word.split("=")[0]
    options = [name for action in parser._actions for name in action.option_strings]
    close = difflib.get_close_matches(option, options, n=1, cutoff=0.5)
    suggestion = f"Did you mean {close[0]}? " if close else ""
    return f"no option {option}. {suggestion}`selfray {command} --help` shows all."


def _phantom_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", type=Path, help="dataset directory to make")
    parser.add_argument("--patients", type=int, default=400, metavar="N", help="patients (400)")
    parser.add_argument(
        "--size", type=int, default=224, metavar="N", help="shorter side of an image, pixels (224)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed (0)")
    parser.add_argument(
        "--sites", nargs="+", default=("A", "B", "C"), metavar="SITE", help="scanners (A B C)"
    )


def _phantom(arguments: argparse.Namespace) -> Iterator[str]:
    from selfray.data.phantom import write_phantom

    write_phantom(
        arguments.out,
        patients=arguments.patients,
        size=arguments.size,
        seed=arguments.seed,
        sites=tuple(arguments.sites),
    )
    yield f"wrote {arguments.out}"


def _ingest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder with radiographs")
    parser.add_argument("out", metavar="OUT", type=Path, help="dataset directory to make")
    parser.add_argument(
        "--size", type=int, default=518, metavar="N", help="shorter side of an image, pixels (518)"
    )
    parser.add_argument(
        "--intensity",
        type=one_of(("minmax", "percentile")),
        default="minmax",
        metavar="minmax|percentile",
        help="what becomes black and white (minmax)",
    )
    parser.add_argument(
        "--table", type=Path, metavar="CSV", help="findings and other metadata, one row a file"
    )
    parser.add_argument(
        "--reports",
        type=Path,
        metavar="PATH",
        help="reports of OpenI (XML) or MIMIC-CXR (text): a folder, .zip or .tgz",
    )
    parser.add_argument("--name", metavar="NAME", help="name of the dataset (that of OUT)")
    parser.add_argument("--origin", metavar="TEXT", help="where the images come from")
    parser.add_argument("--licence", metavar="TEXT", help="terms of use of the images")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the splits (0)")
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="FILE",
        help="secret key of the hashes that replace identifiers, made if missing (OUT.key)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")


def _ingest(arguments: argparse.Namespace) -> Iterator[str]:
    from selfray.data.ingest import ingest

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    yield str(ingest(**given))
    yield f"wrote {arguments.out}"


def _pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=f"one of: {', '.join(RECIPES)}")
    parser.add_argument("--out", type=Path, metavar="RUN", help="run directory to make or resume")
    parser.add_argument(
        "--resume",
        type=one_of(("auto", "must", "never")),
        default="auto",
        metavar="auto|must|never",
        help="auto resumes an unfinished run or begins one, must only resumes, never only begins "
        "(auto)",
    )
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="PNG",
        help="draw crops, masks and texts, and do nothing else",
    )


def _pretrain(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.preview:
        from selfray.preview import write_preview

        write_preview(arguments.config, arguments.preview)
        yield f"wrote {arguments.preview}"
        return
    if arguments.out is None:
        raise InputError("--out RUN is missing: the run directory to make or resume")
    if isinstance(arguments.config, ContrastiveConfig):
        from selfray.pretrain_language import pretrain_language

        pretrain_language(arguments.config, arguments.out, resume=arguments.resume)
    else:
        from selfray.pretrain import pretrain

        pretrain(arguments.config, arguments.out, resume=arguments.resume)
    if os.environ.get("RANK", "0") == "0":  # torchrun sets it; one line is enough
        yield f"wrote {arguments.out}"


def _features_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("encoder", metavar="ENCODER", help="`selfray encoders` says what it can be")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="DIR",
        help="dataset directory, or a folder with radiographs (DICOM, PNG, JPEG, TIFF)",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="features directory to make"
    )
    parser.add_argument(
        "--precision",
        type=one_of(("exact", "bf16", "int8")),
        default="exact",
        metavar="exact|bf16|int8",
        help="nearness to float32: within 2e-5, or cosine of every CLS >= 0.9999, or >= 0.998; "
        "checked on some of the images (exact)",
    )
    parser.add_argument(
        "--backend",
        type=one_of(("auto", "torch", "openvino")),
        default="auto",
        metavar="auto|torch|openvino",
        help="what computes; auto takes the fastest that keeps the promise (auto)",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images at a time (found out by memory)"
    )
    parser.add_argument(
        "--patch-tokens", action="store_true", help="also write the features of every patch"
    )


def _features(arguments: argparse.Namespace) -> Iterator[str]:
    from selfray.features import extract_features

    extract_features(
        arguments.encoder,
        arguments.data,
        arguments.out,
        batch_size=arguments.batch_size,
        patch_tokens=arguments.patch_tokens,
        precision=arguments.precision,
        backend=arguments.backend,
    )
    if os.environ.get("RANK", "0") == "0":  # torchrun sets it; one line is enough
        yield f"wrote {arguments.out}"


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "encoders",
        nargs="*",
        metavar="ENCODER",
        help="encoders to compare, or features directories; see `selfray encoders`",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset directory with labels")
    parser.add_argument("--out", type=Path, metavar="DIR", help="evaluation directory to make")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="classification (the findings), metadata (sex, age, weight, BMI), segmentation (the "
        "masks), reports (by a language model) (the first two)",
    )
    parser.add_argument(
        "--probes",
        nargs="+",
        metavar="PROBE",
        help="linear, knn, zero-shot, sgd, sgd-crops, attentive, fine-tune, fine-tune-last-N "
        "(linear knn)",
    )
    _segmentation_arguments(parser)
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="judge by a published protocol in place of tasks; `list` lists them",
    )
    parser.add_argument(
        "--columns", nargs="+", default=(), metavar="COLUMN", help="predict further columns"
    )
    _evaluate_statistics_arguments(parser)
    _report_arguments(parser)


def _segmentation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decoders",
        nargs="+",
        metavar="DECODER",
        help="of segmentation: linear, linear-four-blocks, vitdet, upernet, each also with "
        "-fine-tuned behind it (linear)",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        default=(),
        metavar="LABEL",
        help="masks and findings to segment (all masks)",
    )
    parser.add_argument(
        "--decoder-steps",
        type=int,
        metavar="N",
        help="train decoders of segmentation for so many steps (a demo's)",
    )
    parser.add_argument(
        "--segmentation-size",
        type=int,
        metavar="PIXELS",
        help="show encoders images of this side for segmentation (their own)",
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chexbert",
        type=Path,
        metavar="DIR",
        help="folder of CheXbert: read findings by it",
    )
    parser.add_argument(
        "--radgraph", type=Path, metavar="DIR", help="folder of RadGraph: compare reports by it"
    )
    add_report_fields(parser)


def _evaluate_statistics_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--label-efficiency",
        action="store_true",
        help="also fit linear probes on 1 to 100 %% of the training patients",
    )
    parser.add_argument(
        "--sites",
        action="store_true",
        help="also fit linear probes on each site, and judge them on each",
    )
    parser.add_argument(
        "--probe-seeds",
        type=int,
        default=1,
        metavar="N",
        help="repeat what is trained step by step so many times (1)",
    )
    parser.add_argument(
        "--training-list",
        nargs=2,
        action="append",
        default=[],
        metavar=("ENCODER", "FILE"),
        help="images that an encoder was trained on, one a line",
    )
    parser.add_argument(
        "--baseline", metavar="ENCODER", help="compare each encoder with this one (with each other)"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="join earlier evaluations in place of judging encoders",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the bootstrap (0)"
    )


def _evaluate(arguments: argparse.Namespace) -> Iterator[str]:
    from selfray.evaluate import (
        FROZEN_PROBES,
        compare,
        evaluate,
        preset_rows,
        results_table,
    )

    if arguments.preset == "list":
        for row in preset_rows():
            yield "  ".join(row)
        return
    if arguments.out is None:
        raise InputError("--out is missing. Name the evaluation directory to make.")
    if arguments.compare:
        if arguments.encoders or arguments.data:
            raise InputError("--compare joins evaluations alone. Leave out ENCODER and --data.")
        compare(arguments.compare, arguments.out, baseline=arguments.baseline)
    else:
        if arguments.data is None:
            raise InputError("--data is missing. Give a dataset directory with labels.")
        evaluate(
            arguments.encoders,
            arguments.data,
            arguments.out,
            tasks=arguments.tasks,
            probes=arguments.probes or FROZEN_PROBES,
            decoders=arguments.decoders or ("linear",),
            labels=arguments.labels,
            decoder_steps=arguments.decoder_steps,
            segmentation_size=arguments.segmentation_size,
            report=_report_task(arguments),
            columns=arguments.columns,
            label_efficiency=arguments.label_efficiency,
            sites=arguments.sites,
            probe_seeds=arguments.probe_seeds,
            preset=arguments.preset,
            training_lists=[(name, Path(file)) for name, file in arguments.training_list],
            baseline=arguments.baseline,
            seed=arguments.seed,
        )
    yield results_table(arguments.out)
    yield f"wrote {arguments.out}"


def _report_task(arguments: argparse.Namespace) -> ReportTask | None:
    """How reports are written; None where nothing was said of it."""
    from selfray.evaluate import ReportTask

    config = report_config(arguments)
    if config is None and arguments.chexbert is None and arguments.radgraph is None:
        return None
    read_by = {"chexbert": arguments.chexbert, "radgraph": arguments.radgraph}
    return ReportTask(**read_by) if config is None else ReportTask(config, **read_by)


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=Path,
        help="evaluation with --tasks reports, or a report model's directory in it",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="radiographs, files")
    parser.add_argument(
        "--encoder",
        metavar="ENCODER",
        help="by which of the evaluation's encoders: its name there, or where it is now (its only "
        "one)",
    )
    parser.add_argument(
        "--prompt",
        default="",
        metavar="TEXT",
        help="what is known, e.g. 'Indication: cough'",
    )


def _generate(arguments: argparse.Namespace) -> Iterator[str]:
    from selfray.generate import generate

    reports = generate(
        arguments.model, arguments.images, encoder=arguments.encoder, prompt=arguments.prompt
    )
    left_out = 0
    for number, report in enumerate(reports, start=1):
        if isinstance(report, InputError):
            left_out += 1
            print(f"generate: image {number}: {report}", file=sys.stderr)
        else:
            yield f"{number}: {report}"
    if left_out:
        raise InputError(
            f"left out {left_out} of {len(arguments.images)} images; the lines above say why"
        )


def _summary_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="run directory or evaluation directory"
    )


def _summary(arguments: argparse.Namespace) -> Iterator[str]:
    from selfray.summary import write_summary

    yield f"wrote {write_summary(arguments.directory)}"


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("encoder", metavar="ENCODER", help="`selfray encoders` says what it can be")
    parser.add_argument(
        "--to",
        required=True,
        type=one_of(tuple(FORMATS)),
        metavar="FORMAT",
        help="what will open it: " + ", ".join(f"{name} ({by})" for name, by in FORMATS.items()),
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to make")


def _export(arguments: argparse.Namespace) -> Iterator[str]:
    from selfray.export.stage import export_encoder

    yield export_encoder(arguments.encoder, arguments.to, arguments.out)
    yield f"wrote {arguments.out}"


def _encoders_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="NAME", help="tell everything about these")
    parser.add_argument(
        "--check",
        action="store_true",
        help="load each and compute features of fixed images: are its files whole and its results "
        "right on this machine",
    )


def _encoders(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.check and not arguments.names:
        raise InputError("--check NAME is missing: the encoders to check")
    if arguments.check:
        from selfray.models.self_test import self_test as told
    else:
        from selfray.models.encoder_listing import encoder_details as told
        from selfray.models.encoder_listing import encoder_table

        if not arguments.names:
            yield from encoder_table()
    for name in arguments.names:
        yield from told(name)


COMMANDS: dict[str, _Command] = {
    "phantom": _Command(
        "Draw synthetic patients and write them as a dataset",
        "OUT [options]",
        _phantom_arguments,
        _phantom,
    ),
    "ingest": _Command(
        "Read a folder of radiographs (DICOM, PNG, TIFF, JPEG) into a dataset",
        "SOURCE OUT [options]",
        _ingest_arguments,
        _ingest,
    ),
    "pretrain": _Command(
        "Pre-train an encoder on the images of a dataset, with or without reports, or continue one",
        "RECIPE --data DIR [DIR ...] --out RUN [options]",
        _pretrain_arguments,
        _pretrain,
    ),
    "features": _Command(
        "Write the features of every image of a dataset",
        "ENCODER --data DIR --out DIR [options]",
        _features_arguments,
        _features,
    ),
    "evaluate": _Command(
        "Compare encoders on the labels of a dataset",
        "(ENCODER [ENCODER ...] --data DIR | --compare DIR [DIR ...]) --out DIR [options]",
        _evaluate_arguments,
        _evaluate,
    ),
    "generate": _Command(
        "Write reports of radiographs by a report model",
        "MODEL IMAGE [IMAGE ...] [options]",
        _generate_arguments,
        _generate,
    ),
    "summary": _Command(
        "Write summary.html for a run or an evaluation", "DIR", _summary_arguments, _summary
    ),
    "export": _Command(
        "Write an encoder for another runtime, and read it back",
        "ENCODER --to FORMAT --out DIR",
        _export_arguments,
        _export,
    ),
    "encoders": _Command(
        "List encoders: what ENCODER can be in the other commands; or check some",
        "[NAME ...] [--check]",
        _encoders_arguments,
        _encoders,
    ),
}
