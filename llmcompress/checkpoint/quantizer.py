"""The transformers integration: `from_pretrained` builds the structured layers that a checkpoint's config lists."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.checkpoint.install import Specs, build_layer, install, layer_spec, structured_layers
from llmcompress.checkpoint.verify import check_files
from llmcompress.errors import InputError
from llmcompress.layers.base import StructuredLinear
from llmcompress.layers.converted import converted_modules, restore

if TYPE_CHECKING:  # transformers may still be importing itself when this module is imported
    from transformers import PreTrainedModel

METHOD = "llmcompress"
VERSION = 1


@register_quantization_config(METHOD)
class LLMCompressConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint: the format's version and the structured sites.

    sites: module path -> {"type": layer kind, ...} as the layer's `spec` gives it. converted: module path -> what a
    backend did to it. checksums: SHA-256 of the tensor files beside this config; a loaded model forgets them, since
    they are wrong for whatever it saves.
    """

    def __init__(
        self,
        version: int = VERSION,
        sites: Specs | None = None,
        checksums: dict[str, str] | None = None,
        converted: Specs | None = None,
        **_: Any,
    ) -> None:
        if version > VERSION:
            raise InputError(f"checkpoint format {version} is newer than this llmcompress reads ({VERSION})")
        self.quant_method = METHOD
        self.version = version
        self.sites = sites or {}
        self.checksums = checksums or {}
        self.converted = converted or {}


@register_quantizer(METHOD)
class LLMCompressQuantizer(HfQuantizer):
    """Replaces the listed modules before the weights are loaded and completes them afterwards."""

    requires_calibration = True
    quantization_config: LLMCompressConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_files([Path(file) for file in kwargs.get("checkpoint_files") or []], self.quantization_config.checksums)
        self.quantization_config.checksums = {}
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        layers = {}
        for name, spec in self.quantization_config.sites.items():
            try:
                model.get_submodule(name)
            except AttributeError:
                raise InputError(f"config.json: quantization_config.sites: the model has no module {name}") from None
            layers[name] = build_layer(name, spec, dtype, "meta")
        install(model, layers)
        with torch.device("meta"):
            restore(model, self.quantization_config.converted)
        _skip_initialisation(model, layers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for layer in structured_layers(model).values():
            layer.after_load()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        self.quantization_config.sites = {name: layer_spec(layer) for name, layer in structured_layers(model).items()}
        self.quantization_config.converted = converted_modules(model)
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether any Trainer may train the model as it is: packed codes need `finetune_model`."""
        return not any(spec.get("packed") for spec in self.quantization_config.sites.values())

    @property
    def is_compileable(self) -> bool:
        return True


def _skip_initialisation(model: PreTrainedModel, layers: Mapping[str, StructuredLinear]) -> None:
    """Some models initialise a block's linear maps from their parent, by a `weight` that structured layers lack."""
    for name in layers:
        parent = model.get_submodule(name.rpartition(".")[0])
        if not [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]:
            parent._is_hf_initialized = True


def has_own_format(model: PreTrainedModel) -> bool:
    """Whether a checkpoint of the model needs `attach`."""
    return bool(structured_layers(model) or converted_modules(model))


def attach(model: PreTrainedModel) -> None:
    """Marks a model whose layers were replaced in memory, so that `save_pretrained` writes a compressed checkpoint."""
    sites = {name: layer_spec(layer) for name, layer in structured_layers(model).items()}
    config = LLMCompressConfig(sites=sites, converted=converted_modules(model))
    model.config.quantization_config = config
    model.hf_quantizer = LLMCompressQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = METHOD
