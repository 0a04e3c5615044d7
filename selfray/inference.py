"""Running an encoder at a stated fidelity: PyTorch or OpenVINO, checked on images of the data."""

from __future__ import annotations

import queue
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from selfray.errors import InputError
from selfray.models.encoder import Encoder
from selfray.models.openvino_graph import (
    has_openvino,
    openvino_core,
    openvino_model,
    require_openvino,
)

PRECISIONS = ("exact", "bf16", "int8")
BACKENDS = ("auto", "torch", "openvino")

EXACT = 2e-5
"""Largest difference of a feature from PyTorch's float32, in units of the largest feature or 1."""
COSINE = {"bf16": 0.9999, "int8": 0.998}
"""Least cosine of every CLS with that of PyTorch's float32 on the publisher's preprocessing."""

# Faster first; each is tried in turn until one keeps the promise.
_CANDIDATES = {
    "exact": ("torch-float32",),
    "bf16": ("openvino-bf16", "torch-bfloat16", "torch-float32"),
    "int8": (
        "openvino-int8-static",
        "openvino-int8-dynamic",
        "openvino-bf16",
        "torch-bfloat16",
        "torch-float32",
    ),
}
_QUANTISED = "quantised"  # folder of the int8 graph, within the directory under way
# Tokens a batch beyond which a CPU core gains nothing more (measured at 224 and at 518 pixels).
_CPU_BATCH_TOKENS = 2048
_MOST_IMAGES = 64  # in a batch on a CPU
_MEMORY_SHARE = 0.5  # of what is free may be used by activations
# float32 values a token and unit of width that a block holds at most: the input, its norm, query,
# key, value and their product, or 4 + 4 in the feed-forward part; twice, for the copies between.
_VALUES_A_TOKEN = 20


class Backend(Protocol):
    """What runs an encoder.

    Attributes:
        name: For the manifest.
        concurrency: Threads that may call it at the same time.
        batch_size: Images that each call takes.
    """

    name: str
    concurrency: int
    batch_size: int

    def __call__(self, squares: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays by name for squares [b, c, S, S], b <= `batch_size`."""
        ...


class FeatureGraph(nn.Module):
    """From squares, as preprocessing cuts them out, to the arrays that are written.

    Args:
        encoder: Whose.
        patch_tokens: Whether patch tokens are among the outputs.
    """

    def __init__(self, encoder: Encoder, patch_tokens: bool) -> None:
        super().__init__()
        self.model, self._preprocessing = encoder.model, encoder.preprocessing
        self._grid = encoder.grid if patch_tokens else None
        self.outputs = ("cls", "patch_mean", *(("patch_tokens",) if patch_tokens else ()))

    def forward(self, squares: Tensor) -> tuple[Tensor, ...]:
        """[B, c, S, S] to CLS [B, D], mean patch [B, D] and, if asked for, [B, h, w, D]."""
        tokens = self.model(self._preprocessing.normalise(squares))
        patches = tokens.patches.float()
        arrays = (tokens.cls.float(), patches.mean(1))
        return arrays if self._grid is None else (*arrays, patches.unflatten(1, self._grid))


class TorchBackend:
    """PyTorch, on the GPU if there is one.

    Args:
        encoder: To run.
        patch_tokens: Whether patch tokens are wanted.
        bfloat16: Compute matrix products in bfloat16.
        device: Where.
        threads: Calls at the same time on a CPU, each on one core.
        batch_size: Images a call; found out if None.
    """

    def __init__(
        self,
        encoder: Encoder,
        patch_tokens: bool,
        *,
        bfloat16: bool,
        device: torch.device,
        threads: int,
        batch_size: int | None = None,
    ) -> None:
        self.name = "torch-bfloat16" if bfloat16 else "torch-float32"
        self.concurrency = threads if device.type == "cpu" else 1
        if device.type == "cpu":
            torch.set_num_threads(1)  # a core an image beats two cores that wait for each other
        self._device, self._bfloat16 = device, bfloat16
        graph = FeatureGraph(encoder, patch_tokens).to(device).eval()
        self._outputs = graph.outputs
        self._graph = torch.compile(graph) if device.type == "cuda" and bfloat16 else graph
        self.batch_size = batch_size or cpu_batch_size(encoder, threads)
        if device.type == "cuda" and batch_size is None:
            self.batch_size = self._largest_batch(encoder)

    def __call__(self, squares: np.ndarray) -> dict[str, np.ndarray]:
        """See `Backend`."""
        autocast = torch.autocast(self._device.type, torch.bfloat16)
        with torch.inference_mode(), autocast if self._bfloat16 else nullcontext():
            arrays = self._graph(torch.from_numpy(squares).to(self._device))
        return {
            name: array.float().cpu().numpy()
            for name, array in zip(self._outputs, arrays, strict=True)
        }

    def _largest_batch(self, encoder: Encoder) -> int:
        """Double the batch until half of the GPU's free memory is used, or it runs out."""
        batch = 1
        limit = _MEMORY_SHARE * torch.cuda.mem_get_info(self._device)[0]
        while batch < 1024:
            torch.cuda.reset_peak_memory_stats(self._device)
            try:
                self(np.zeros((2 * batch, 1, *(encoder.image_size,) * 2), np.uint8))
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            if torch.cuda.max_memory_allocated(self._device) > limit:
                break
            batch *= 2
        return batch


class OpenVinoBackend:
    """OpenVINO on the CPU: one stream a core, so that no core waits for another.

    Args:
        name: `openvino-float32`, `-bf16`, `-int8-static` or `-int8-dynamic`.
        graph: An `openvino.Model` whose input is squares [B, c, S, S].
        outputs: Names of its outputs, in order.
        batch_size: Images a call; shorter batches are filled up.
        threads: Streams.
    """

    def __init__(
        self, name: str, graph: Any, outputs: tuple[str, ...], *, batch_size: int, threads: int
    ) -> None:
        self.name, self.batch_size, self.concurrency = name, batch_size, threads
        self._outputs = outputs
        shape = graph.input(0).get_partial_shape()
        shape[0] = batch_size
        graph.reshape(shape)
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32" if name == "openvino-float32" else "bf16",
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": threads,
            "ENABLE_CPU_PINNING": False,  # decoders need the cores now and then
        }
        if name == "openvino-int8-dynamic":
            # Activations are scaled a token and so many channels at a time.
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = (
                graph.output(0).partial_shape[1].get_length()
            )
        compiled = openvino_core().compile_model(graph, "CPU", options)
        self._requests = queue.SimpleQueue[Any]()
        for _ in range(threads):
            self._requests.put(compiled.create_infer_request())

    def __call__(self, squares: np.ndarray) -> dict[str, np.ndarray]:
        """See `Backend`."""
        filled = squares
        if len(squares) < self.batch_size:
            rest = np.repeat(squares[-1:], self.batch_size - len(squares), axis=0)
            filled = np.concatenate([squares, rest])
        request = self._requests.get()
        try:
            request.infer({0: filled}, share_inputs=True)
            return {
                name: request.get_output_tensor(index).data[: len(squares)].copy()
                for index, name in enumerate(self._outputs)
            }
        finally:
            self._requests.put(request)


@dataclass(frozen=True)
class Samples:
    """Images of the data on which a backend is checked.

    Attributes:
        exact: Squares [n, c, S, S] as the publisher's preprocessing makes them.
        prepared: The same images as the run makes them.
        calibration: Other images, as the run makes them, from which int8 takes its ranges.
    """

    exact: np.ndarray
    prepared: np.ndarray
    calibration: np.ndarray


class Inference:
    """Opens backends of one encoder.

    Args:
        encoder: To run.
        patch_tokens: Whether patch tokens are wanted.
        directory: Where the int8 graph is kept, so that a resumed run computes the same.
        threads: CPU threads to use.
        batch_size: Images a call; found out if None.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        patch_tokens: bool,
        directory: Path,
        threads: int,
        batch_size: int | None = None,
    ) -> None:
        self._encoder, self._patch_tokens = encoder, patch_tokens
        self._directory, self._threads, self._batch_size = directory, threads, batch_size
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def open(self, name: str, samples: Samples | None = None) -> Backend:
        """One backend by its name.

        Args:
            name: As in a manifest.
            samples: Needed to make an int8 graph that is not in the directory yet.

        Raises:
            InputError: A package is missing.
        """
        if name.startswith("torch-"):
            return TorchBackend(
                self._encoder, self._patch_tokens, bfloat16=name == "torch-bfloat16",
                device=self._device, threads=self._threads, batch_size=self._batch_size,
            )  # fmt: skip
        require_openvino()
        batch = self._batch_size or cpu_batch_size(self._encoder, self._threads)
        return OpenVinoBackend(
            name, self._graph(name, samples), self._outputs,
            batch_size=batch, threads=self._threads,
        )  # fmt: skip

    def choose(
        self, precision: str, backend: str, samples: Samples, reference: np.ndarray
    ) -> tuple[Backend, dict[str, Any]]:
        """The fastest backend that keeps the promise on the samples.

        Args:
            precision: One of `PRECISIONS`.
            backend: One of `BACKENDS`.
            samples: To check it on.
            reference: CLS of the same samples, see `reference`.

        Returns:
            The backend, and what was measured, for the manifest.

        Raises:
            InputError: No backend of this kind keeps it.
        """
        for name in self._candidates(precision, backend):
            found = self.open(name, samples)
            measured = _fidelity(_cls_of(found, samples.prepared), reference)
            if _kept(precision, measured):
                return found, {"images": len(reference), **measured}
            print(
                f"features: {name} does not keep the promise of --precision {precision}: least "
                f"cosine {measured['cosine']:.6f}, largest difference {measured['difference']:.1e}"
                "; taking the next backend",
                file=sys.stderr,
            )
        raise InputError(
            f"no backend {backend!r} keeps the promise of --precision {precision}. Use --backend "
            "auto."
        )

    def reference(self, samples: Samples) -> np.ndarray:
        """CLS [n, D] by float32 on the samples as the publisher's preprocessing makes them."""
        return _cls_of(self.open("torch-float32"), samples.exact)

    def reading_is_near(self, precision: str, samples: Samples, reference: np.ndarray) -> bool:
        """Whether float32 on the images as the run reads them takes half of the promise at most."""
        if np.array_equal(samples.exact, samples.prepared):
            return True
        prepared = _cls_of(self.open("torch-float32"), samples.prepared)
        return 1 - _fidelity(prepared, reference)["cosine"] <= (1 - COSINE[precision]) / 2

    def _candidates(self, precision: str, backend: str) -> Iterator[str]:
        """Names to try, the fastest first."""
        if precision == "exact" and backend == "openvino":
            yield "openvino-float32"
            return
        for name in _CANDIDATES[precision]:
            library = name.partition("-")[0]
            possible = library == "torch" or (self._device.type == "cpu" and has_openvino())
            if possible and backend in ("auto", library):
                yield name

    @property
    def _outputs(self) -> tuple[str, ...]:
        return FeatureGraph(self._encoder, self._patch_tokens).outputs

    def _graph(self, name: str, samples: Samples | None) -> Any:
        """An OpenVINO model; an int8 one is read from the directory, or made and put there."""
        import openvino  # pyright: ignore[reportMissingImports]

        kept = self._directory / _QUANTISED / f"{name}.xml"
        if kept.exists():
            return openvino_core().read_model(kept)
        graph = _converted(self._encoder, self._patch_tokens)
        if "int8" not in name:
            return graph
        assert samples is not None  # a run that goes on has its graph
        graph = _quantised(graph, name, samples.calibration)
        new = self._directory / f"{_QUANTISED}.partial"
        shutil.rmtree(new, ignore_errors=True)
        try:
            openvino.save_model(graph, new / kept.name, compress_to_fp16=False)
        except RuntimeError as cause:  # of a stream; it does not say why
            raise InputError(
                f"{new}: the int8 graph cannot be written. Make room there, then repeat the "
                "command, or use --precision bf16."
            ) from cause
        shutil.rmtree(kept.parent, ignore_errors=True)
        new.rename(kept.parent)
        return openvino_core().read_model(kept)

    def forget_graph(self) -> None:
        """Remove the int8 graph, when the run is done."""
        shutil.rmtree(self._directory / _QUANTISED, ignore_errors=True)


def require_backend(precision: str, backend: str) -> None:
    """Refuse what can never work, before anything is written.

    Args:
        precision: One of `PRECISIONS`.
        backend: One of `BACKENDS`.

    Raises:
        InputError: PyTorch has no int8, or OpenVINO is needed and not installed.
    """
    if precision == "int8" and backend == "torch":
        raise InputError("PyTorch has no int8 here. Use --backend auto, or --precision bf16.")
    if backend == "openvino" or (precision == "int8" and not torch.cuda.is_available()):
        require_openvino(int8=precision == "int8")


def cpu_batch_size(encoder: Encoder, streams: int) -> int:
    """Images a call on a CPU: enough to fill a core, as far as memory allows.

    Args:
        encoder: Whose grid and width say how much an image is.
        streams: Calls at the same time.
    """
    tokens = encoder.grid[0] * encoder.grid[1] + 1
    image_bytes = 4 * (tokens * encoder.width * _VALUES_A_TOKEN + 3 * encoder.image_size**2)
    room = _MEMORY_SHARE * psutil.virtual_memory().available / streams
    return int(max(1, min(_CPU_BATCH_TOKENS // tokens, room // image_bytes, _MOST_IMAGES)))


def _cls_of(backend: Backend, squares: np.ndarray) -> np.ndarray:
    step = backend.batch_size
    batches = [squares[start : start + step] for start in range(0, len(squares), step)]
    with ThreadPoolExecutor(backend.concurrency) as pool:
        return np.concatenate([arrays["cls"] for arrays in pool.map(backend, batches)])


def _fidelity(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How near features are to the reference; values that are not finite give NaN.

    The least cosine; the same after the images' mean was taken off, which tells how well images
    are told apart where all of them are alike; the largest difference.
    """
    a, b = found.astype(np.float64), reference.astype(np.float64)
    difference = np.abs(a - b).max() / max(1.0, np.abs(b).max())
    mean = b.mean(axis=0) if len(b) > 1 else 0.0
    return {
        "cosine": _least_cosine(a, b),
        "centred_cosine": _least_cosine(a - mean, b - mean),
        "difference": float(difference),
    }


def _least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    # A vector of nothing but zeros has no direction: right if it should be one.
    of_zeros = (a == b).all(axis=1).astype(np.float64)
    cosine = np.where(norms == 0, of_zeros, (a * b).sum(axis=1) / np.where(norms == 0, 1, norms))
    return float(cosine.min())


def _kept(precision: str, measured: dict[str, float]) -> bool:
    if precision == "exact":
        return measured["difference"] <= EXACT
    return measured["cosine"] >= COSINE[precision]


@torch.no_grad()
def _converted(encoder: Encoder, patch_tokens: bool) -> Any:
    """The encoder as an OpenVINO model, squares of one channel in, batch free."""
    graph = FeatureGraph(encoder, patch_tokens).eval()
    blank = np.zeros((encoder.image_size,) * 2, np.uint8)
    square = encoder.preprocessing.square(blank)
    # Two images, as a dimension of 1 would be taken for one that is always 1.
    example = torch.from_numpy(np.stack([square, square]))
    batch = {"squares": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(graph, (example,), dynamic_shapes=batch)
    return openvino_model(program, square.shape, graph.outputs)


def _quantised(graph: Any, name: str, calibration: np.ndarray) -> Any:
    import logging

    # Imported by nncf, it tells that there is no compiler of CUDA, which nobody needs.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf  # pyright: ignore[reportMissingImports]

    nncf.set_log_level(logging.ERROR)
    if name == "openvino-int8-dynamic":
        with redirect_stdout(sys.stderr):  # its bars
            return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    images = nncf.Dataset([calibration[i : i + 1] for i in range(len(calibration))])
    with redirect_stdout(sys.stderr):  # its bars
        return nncf.quantize(
            graph, images, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration)
        )
