"""Files of causal language models: read as transformers lays them out, but never unpickled.

A GGUF file is converted once: what transformers builds from one directly can neither be saved nor
trained as a whole.
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from selfray.errors import InputError, one_line
from selfray.models.huggingface import read_json
from selfray.models.weights_file import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Fits = Callable[[Path, "PreTrainedModel"], None]
"""Told where a network is from and the network without weights; raises if there is no memory."""

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_GGUF = b"GGUF"
_CONVERTED = "converted"  # the file that a conversion ends with


def transformers_library(what: str, *, extra: str = "reports") -> ModuleType:
    """The transformers library.

    Args:
        what: What needs it, for the error.
        extra: Of this package, which installs it.

    Raises:
        InputError: It is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"{what} needs the transformers library, which is not installed. "
            f"Install it: pip install 'selfray[{extra}]'."
        ) from None
    return transformers


@contextmanager
def quiet(transformers: ModuleType) -> Iterator[None]:
    """No bars and warnings of transformers: errors say the same in one line."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a language model.

    Raises:
        InputError: There is none, it is damaged, or its kind of network is not in transformers:
            code that comes with a model is not run.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    file = directory / "config.json"
    if not file.exists():
        raise InputError(
            f"{directory} is no language model: config.json is missing. Give a directory with "
            "config.json, safetensors and the tokenizer's files, or a GGUF file."
        )
    model_type = read_json(file).get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise InputError(
            f"{file}: model_type is {model_type!r}, which is no causal language model of this "
            "version of transformers, and code that comes with a model is not run. Give another "
            "model."
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as cause:
        raise InputError(f"{file}: {one_line(cause)}. Copy it anew.") from cause


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a language model, one or several.

    Raises:
        InputError: There are none, only pickled ones, or a part is missing.
    """
    if (directory / _WHOLE).exists():
        return [directory / _WHOLE]
    if (directory / _INDEX).exists():
        shards = read_json(directory / _INDEX).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        missing = [name for name in names if not (directory / name).is_file()]
        if missing or not names:
            raise InputError(
                f"{directory}: {_INDEX} names {len(names)} files, of which {len(missing)} are "
                f"missing, first {missing[:1]}. Copy them there."
            )
        return [directory / name for name in names]
    pickled = sorted(file.name for file in directory.glob("*.bin"))
    if pickled:
        raise InputError(
            f"{directory} has pickled weights only ({pickled[0]}), which can run any code and are "
            "not opened. Take the model's safetensors, or convert it elsewhere."
        )
    raise InputError(f"{directory} has no {_WHOLE} and no {_INDEX}. Copy the weights there.")


def hash_of(files: Sequence[Path]) -> str:
    """SHA-256 of weights, those of several files in one."""
    hashes = [sha256_of(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def hash_of_source(source: Path) -> str:
    """SHA-256 of the weights of a language model's directory, or of a GGUF file.

    Raises:
        InputError: There are none, or no config beside them.
    """
    if source.suffix != ".gguf":
        read_config(source)
        return hash_of(weight_files(source))
    if not source.is_file():
        raise InputError(f"{source} is missing. Give a GGUF file, or a language model's directory.")
    return sha256_of(source)


def network_without_weights(config: PreTrainedConfig, directory: Path) -> PreTrainedModel:
    """The network on the meta device, which takes no memory.

    Raises:
        InputError: The configuration describes none.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, KeyError) as cause:
        raise InputError(
            f"{directory / 'config.json'} describes no network: {one_line(cause)}. Copy it anew."
        ) from cause


def read_network(config: PreTrainedConfig, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The network with its weights, all of them.

    Args:
        config: Of it.
        directory: With safetensors.
        dtype: Of the weights.

    Raises:
        InputError: Weights are damaged, missing, left over or of another shape.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as cause:
        raise InputError(f"{directory}: {one_line(cause)}. Copy it anew.") from cause
    network, info = loaded
    wrong = {key: len(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if wrong["missing_keys"] or wrong["mismatched_keys"]:
        raise InputError(
            f"{directory}: {wrong['missing_keys']} parameters are missing and "
            f"{wrong['mismatched_keys']} of another shape than config.json asks for. Take weights "
            "and config.json from the same model."
        )
    return network


def converted_gguf(file: Path, cache: Path, fits: Fits) -> Path:
    """The directory that a GGUF file was converted to; made at the first call.

    Weights that were quantised become float32 numbers of the same values.

    Args:
        file: One whole model.
        cache: Directory for conversions; each is named by its file's hash.
        fits: See `Fits`; asked before weights are read.

    Raises:
        InputError: It is missing, damaged, or of a kind that transformers does not read.
    """
    made = cache / f"{file.stem}-{hash_of_source(file)[:12]}"
    if (made / _CONVERTED).exists():
        return made
    network, tokenizer = _read_gguf(file, fits)
    new = made.with_name(f".{made.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    network.save_pretrained(new)
    tokenizer.save_pretrained(new)
    (new / _CONVERTED).write_text(f"{file.name}\n", encoding="utf-8")
    shutil.rmtree(made, ignore_errors=True)
    new.rename(made)
    return made


def _read_gguf(file: Path, fits: Fits) -> tuple[Any, Any]:
    try:
        import gguf
    except ImportError:
        raise InputError(
            f"{file} is read with the gguf library, which is not installed. "
            "Install it: pip install 'selfray[reports]'."
        ) from None
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with file.open("rb") as content:
        begins = content.read(4)
    if begins != _GGUF:
        raise InputError(
            f"{file} is no GGUF file: it begins with {begins!r}, not with {_GGUF!r}. Give one, or "
            "a language model's directory."
        )
    try:
        gguf.GGUFReader(file)
    except (ValueError, KeyError, IndexError) as cause:  # NumPy's, of arrays that are too short
        raise InputError(
            f"{file} ({file.stat().st_size} bytes) is cut off, damaged, or of a kind that the gguf "
            "library does not know. Copy it anew, or give another."
        ) from cause
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(file.parent, **where)
        fits(file, network_without_weights(config, file))
        with redirect_stderr(io.StringIO()):  # a bar that the library has no switch for
            network: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype=torch.float32, use_safetensors=True, **where
            )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except (OSError, ValueError, RuntimeError, KeyError, IndexError) as cause:
        raise InputError(f"{file}: {one_line(cause)}. Copy it anew, or give another.") from cause
    # The weights are plain by now, but what marks them as quantised would refuse to be saved.
    network.hf_quantizer = None
    if hasattr(network.config, "quantization_config"):
        del network.config.quantization_config
    return network, tokenizer
