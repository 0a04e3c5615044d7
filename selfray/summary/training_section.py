"""Training: the curves of each run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from selfray.summary.charts import curve_chart, probe_chart
from selfray.summary.inputs import Run, number
from selfray.summary.markup import PHANTOM, escaped, figure
from selfray.summary.verdict import run_verdict

# Title, axis, whether logarithmic, and label and metric of each curve.
_PANELS: tuple[tuple[str, str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "loss (nats)", False, (("", "loss"),)),
    (
        "Terms of the loss",
        "loss (nats)",
        False,
        (
            ("DINO, global crops", "loss_dino_global"),
            ("DINO, local crops", "loss_dino_local"),
            ("iBOT", "loss_ibot"),
        ),
    ),
    ("KoLeo", "loss (nats)", False, (("", "loss_koleo"),)),
    ("Entropy of the teacher", "entropy (nats)", False, (("", "teacher_entropy"),)),
    ("Likeness of different images", "mean cosine (1: collapse)", False, (("", "mean_cosine"),)),
    ("Own text found", "share of images", False, (("", "pairs_found"),)),
    ("Factor of the similarities", "1 / temperature", False, (("", "logit_scale"),)),
    ("Gradient", "gradient norm", True, (("", "gradient_norm"),)),
    ("Learning rate", "learning rate", False, (("", "learning_rate"),)),
)


def training_section(runs: Sequence[Run], is_synthetic: Callable[[Run], bool]) -> str:
    """The section with every run.

    Args:
        runs: Read by `read_run`.
        is_synthetic: Whether a run saw phantoms.
    """
    parts = [_run(run, f"{PHANTOM}. " if is_synthetic(run) else "") for run in runs]
    return f'<section id="training"><h2>Training</h2>{"".join(parts)}</section>'


def _run(run: Run, note: str) -> str:
    init = run.config.get("init")
    start = f"Continued from {init}." if init else "From random weights."
    told = escaped(f"{start} {run_verdict(run)}")
    head = f"<h3>{escaped(run.path.resolve().name)}</h3><p>{told}</p>"
    charts = [*_probe_charts(run), *_curve_charts(run)]
    if not charts:
        return head + "<p>No step is recorded yet.</p>"
    speed = f" {run.images_per_second:,.3g} images/s." if run.images_per_second else ""
    thinned = any(curve.thinned for curve in run.curves.values())
    band = " Line: mean of neighbouring steps; band: their least and greatest." if thinned else ""
    probes = (
        " Probes are linear, on frozen features of the encoder and on the validation split, where "
        "their penalty is chosen too: good for comparing steps, slightly optimistic in itself."
        if run.probes
        else ""
    )
    name = escaped(run.path.resolve().name)
    caption = f"{note}<b>Training of {name}.</b>{probes}{band}{speed}"
    return head + figure(f'<div class="charts">{"".join(charts)}</div>', caption)


def _probe_charts(run: Run) -> list[str]:
    charts = []
    macro = _course(run, "macro_auroc")
    if macro[0]:
        start = number((run.start or {}).get("macro_auroc"))
        best = run.best
        mark = (best["step"], best["macro_auroc"]) if best else None
        charts.append(
            probe_chart(
                [("findings", *macro)],
                title="Probe: findings",
                axis="macro-AUROC",
                start=start,
                best=mark,
            )
        )
    others = [("sex, AUROC", "sex_auroc"), ("age, R²", "age_r2")]
    lines = [(label, *_course(run, metric)) for label, metric in others]
    lines = [line for line in lines if line[1]]
    if lines:
        charts.append(probe_chart(lines, title="Probe: sex and age", axis="AUROC, R²"))
    return charts


def _course(run: Run, metric: str) -> tuple[list[float], list[float]]:
    known = [(p["step"], v) for p in run.probes if (v := number(p.get(metric))) is not None]
    return [step for step, _ in known], [value for _, value in known]


def _curve_charts(run: Run) -> list[str]:
    charts = []
    for title, axis, logarithmic, wanted in _PANELS:
        curves = [(label, run.curves[metric]) for label, metric in wanted if metric in run.curves]
        unused = all(not any(curve.least + curve.greatest) for _, curve in curves)
        if curves and not unused:  # a term with weight 0 is zero all the way
            charts.append(curve_chart(curves, title=title, axis=axis, logarithmic=logarithmic))
    return charts
