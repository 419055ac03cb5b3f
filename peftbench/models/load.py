"""Load a frozen backbone and its tokenizer: from a package, a folder or the hub, or random from its architecture."""

import contextlib
import dataclasses
import functools
import inspect
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from peftbench.config import ModelConfig
from peftbench.errors import UserError
from peftbench.models import streaming
from peftbench.models import tokenizer as builtin
from peftbench.models.quantized import Scheme, backend, quantize
from peftbench.models.source import Source, locate, tokenizer_folder

logger = logging.getLogger(__name__)

FORMULATIONS = ("head", "text")
SEED = 0
"""Of random weights."""

PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
"""Settings of `transformers` configs that list one value a layer."""

LARGE = 2**28
"""Random models of more parameters are drawn on their own device."""


@dataclass
class Backbone:
    """A frozen model in eval mode, its tokenizer, kind (encoder, decoder or seq2seq) and its weights' fingerprint."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: str
    config: ModelConfig
    sha256: str


def load(
    config: ModelConfig, formulation: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Backbone:
    """Load a backbone: without a task head for formulation "head", with its language-model head for "text".

    Of a seq2seq model "head" takes the encoder alone. Every parameter is frozen and the key-value cache off. With
    `model.quantization` the linear layers (not the language-model head) are quantized as `dtype` holds them, one by
    one, each on `device`; only small random models and GGUF files are dense on the CPU before.
    Raises UserError if the model cannot be had or cannot do what the formulation asks.
    """
    source = locate(config)
    hf_config = _hf_config(config, source)
    kind = kind_of(config, hf_config)
    auto = _auto_class(config, kind, formulation)
    scheme = _scheme(config)
    if scheme is not None:
        backend(scheme.backend)
    if source.kind == "random":
        model = _random(config, hf_config, auto, dtype, torch.device(device), scheme)
    else:
        model = _load_weights(config, source, hf_config, auto, dtype, torch.device(device), scheme)
    _freeze(model)
    tokenizer = _tokenizer(config, source, kind, hf_config)
    model.to(device)  # type: ignore[arg-type]
    return Backbone(model, tokenizer, kind, dataclasses.replace(config, kind=kind), source.sha256)


def build_meta(config: ModelConfig, formulation: str, depth: int | None = None) -> PreTrainedModel:
    """The module `load` would give, on the meta device: shapes without weights, files or network.

    A model without `architecture` has its config read from its checkpoint. `depth`: the first layers alone, in each of
    an encoder-decoder's stacks.
    """
    hf_config = shape_config(config)
    if depth is not None:
        _cut(hf_config, depth)
    auto = _auto_class(config, kind_of(config, hf_config), formulation)
    with torch.device("meta"):
        model = auto.from_config(hf_config, dtype=torch.float32, **_options(config, hf_config, auto))
    scheme = _scheme(config)
    if scheme is not None:
        quantize(model, scheme)
    _freeze(model)
    return model


def shape_config(config: ModelConfig) -> PreTrainedConfig:
    """Return the `transformers` config that gives the model's shapes."""
    return _hf_config(config, locate(config)) if config.architecture is None else _from_architecture(config)


def _cut(hf_config: Any, depth: int) -> None:
    """Have `hf_config` describe the first `depth` layers."""
    for name in PER_LAYER:
        if isinstance(getattr(hf_config, name, None), list):
            setattr(hf_config, name, getattr(hf_config, name)[:depth])
    hf_config.num_hidden_layers = depth
    if getattr(hf_config, "is_encoder_decoder", False):
        hf_config.num_decoder_layers = depth


def _scheme(config: ModelConfig) -> Scheme | None:
    return None if config.quantization is None else Scheme.parse(config.quantization)


def _freeze(model: PreTrainedModel) -> None:
    for module in model.modules():
        # T5's stacks hold copies of the config
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False
    model.requires_grad_(False)
    model.eval()


def _from_architecture(config: ModelConfig) -> PreTrainedConfig:
    settings = dict(config.architecture or {})
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"model.architecture of {config.name!r}: {error}; expected model_type and the settings of its "
            "transformers config"
        ) from error


def _hf_config(config: ModelConfig, source: Source) -> PreTrainedConfig:
    if source.kind == "random":
        return _from_architecture(config)
    try:
        return AutoConfig.from_pretrained(_place(config, source), **_where(source))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"model {config.name!r}: no readable config in {_place(config, source)} ({_first(error)})"
        ) from error


def _place(config: ModelConfig, source: Source) -> str:
    return str(source.path) if source.path is not None else str(config.checkpoint)


def _where(source: Source) -> dict[str, Any]:
    if source.path is None:
        return {"revision": source.revision}
    return {"gguf_file": source.gguf_file} if source.gguf_file else {}


def _first(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def kind_of(config: ModelConfig, hf_config: PreTrainedConfig) -> str:
    """Return encoder, decoder or seq2seq: what the settings say, else what the architecture was pretrained as."""
    if config.family is not None and hf_config.model_type != config.family:
        raise UserError(f"model.family={config.family}: the checkpoint of {config.name!r} is {hf_config.model_type!r}")
    if config.kind is not None:
        return config.kind
    if getattr(hf_config, "is_encoder_decoder", False):
        return "seq2seq"
    # BERT and its kin are in both lists; what has a masked-language-model head was pretrained as an encoder
    masked = hf_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "decoder" if not masked and hf_config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "encoder"


def _auto_class(config: ModelConfig, kind: str, formulation: str) -> Any:
    if formulation not in FORMULATIONS:
        raise UserError(f"formulation={formulation}: expected one of {', '.join(FORMULATIONS)}")
    if formulation == "head":
        return AutoModelForTextEncoding if kind == "seq2seq" else AutoModel
    if kind == "encoder":
        raise UserError(
            f"model {config.name!r} is an encoder: it classifies with a head and cannot generate text; "
            "choose a decoder or seq2seq model for this task"
        )
    return AutoModelForSeq2SeqLM if kind == "seq2seq" else AutoModelForCausalLM


def _model_class(config: ModelConfig, hf_config: PreTrainedConfig, auto: Any) -> type[PreTrainedModel]:
    try:
        found = auto._model_mapping[type(hf_config)]
    except KeyError as error:
        raise UserError(
            f"model {config.name!r}: transformers has no {auto.__name__} for {hf_config.model_type!r}"
        ) from error
    return found[0] if isinstance(found, (tuple, list)) else found


def _options(config: ModelConfig, hf_config: PreTrainedConfig, auto: Any) -> dict[str, Any]:
    model_class = _model_class(config, hf_config, auto)
    attention = config.attention
    # SDPA has no place for the cap that Gemma 2 puts on its attention scores
    capped = getattr(hf_config, "attn_logit_softcapping", None) is not None
    if attention == "sdpa" and (capped or not model_class._supports_sdpa):
        logger.warning("%s cannot use sdpa attention: using eager", model_class.__name__)
        attention = "eager"
    options: dict[str, Any] = {"attn_implementation": attention}
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = config.pooling == "pooler"
    elif config.pooling == "pooler":
        raise UserError(f"model.pooling=pooler: {model_class.__name__} has no pooler; expected mean, first or last")
    return options


def _random(
    config: ModelConfig,
    hf_config: PreTrainedConfig,
    auto: Any,
    dtype: torch.dtype,
    device: torch.device,
    scheme: Scheme | None,
) -> PreTrainedModel:
    """Random weights from a fixed seed; drawn in fp32 on the CPU they are alike on every machine and in every dtype.

    Models of more than `LARGE` parameters are drawn on the device and in the dtype they are meant for, because that
    takes seconds instead of minutes: their weights differ between kinds of device, and from those of a quantized model,
    which are drawn layer by layer.
    """
    options = _options(config, hf_config, auto)
    home = device
    with torch.device("meta"):
        large = auto.from_config(_from_architecture(config), **options).num_parameters() > LARGE
    if not large:
        device = torch.device("cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        if device.type == "cuda":
            torch.cuda.manual_seed(SEED)
        # not torch.manual_seed, which also sets the generators of devices that are not put back here
        torch.default_generator.manual_seed(SEED)
        if large and scheme is not None:
            with torch.device("meta"):
                model = auto.from_config(hf_config, dtype=dtype, **options)
            streaming.draw(model, scheme, device)
            return model
        model = auto.from_config(hf_config, dtype=dtype if large else torch.float32, **options)
    # only parameters: tables of rotary frequencies stay in fp32, as they do in a loaded checkpoint
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if scheme is not None:
        quantize(model, scheme, device=home)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # what transformers would report is checked here: missing tensors are refused, an unused head is expected
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _load_weights(
    config: ModelConfig,
    source: Source,
    hf_config: PreTrainedConfig,
    auto: Any,
    dtype: torch.dtype,
    device: torch.device,
    scheme: Scheme | None,
) -> PreTrainedModel:
    options = _options(config, hf_config, auto)
    if scheme is not None and source.gguf_file is None:
        options["quantization_config"] = streaming.OnTheFly(scheme, device)
    place = _place(config, source)
    try:
        # reading GGUF draws a progress bar that no setting turns off
        with _quiet(), contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else contextlib.nullcontext():
            model, info = auto.from_pretrained(
                place, config=hf_config, dtype=dtype, output_loading_info=True, **options, **_where(source)
            )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model {config.name!r}: loading {place} failed ({_first(error)})") from error
    if source.gguf_file:
        # the weights are dense by now; the mark of a quantized model would be untrue
        model.config.__dict__.pop("quantization_config", None)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"model {config.name!r}: {place} lacks {len(missing)} tensors of {type(model).__name__}, {missing[0]!r} "
            "first; they would be random. Expected a whole checkpoint of this architecture"
        )
    if scheme is not None and source.gguf_file:
        # transformers has no way to quantize what it reads from GGUF
        quantize(model, scheme, device=device)
    return model


def _tokenizer(config: ModelConfig, source: Source, kind: str, hf_config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    if source.kind == "random":
        folder = None if config.tokenizer == "builtin" else tokenizer_folder(config)
        if folder is None:
            if config.tokenizer != "builtin":
                logger.warning(
                    "model %s: no tokenizer files on this machine, using the built-in tokenizer of %d tokens",
                    config.name,
                    builtin.VOCABULARY_SIZE,
                )
            # RoBERTa has a table of one type and its tokenizer gives none
            token_types = (getattr(hf_config, "type_vocab_size", None) or 0) > 1
            return _checked(config, builtin.build(kind, token_types), hf_config)
        gguf = next(folder.glob("*.gguf"), None) if not any(folder.glob("tokenizer*")) else None
        tokenizer = _read_tokenizer(config, str(folder), {"gguf_file": gguf.name} if gguf else {})
    elif config.tokenizer is not None:
        tokenizer = _read_tokenizer(config, config.tokenizer, {})
    else:
        tokenizer = _read_tokenizer(config, _place(config, source), _where(source))
    if tokenizer.pad_token is None:
        # padded positions are masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return _checked(config, tokenizer, hf_config)


def _read_tokenizer(config: ModelConfig, place: str, where: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place, **where)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model {config.name!r}: no readable tokenizer in {place} ({_first(error)})") from error


def _checked(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, hf_config: PreTrainedConfig
) -> PreTrainedTokenizerBase:
    vocabulary = getattr(hf_config, "vocab_size", None)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise UserError(
            f"model {config.name!r}: its tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocabulary}; "
            "expected a tokenizer that fits (model.tokenizer)"
        )
    return tokenizer


def set_dropout(model: nn.Module, p: float | None) -> Callable[[], None]:
    """Set every dropout probability of `model` to `p`; None leaves the model's own. Returns a function that undoes it.

    Dropout modules, probabilities that modules keep as numbers (Llama's `attention_dropout`, OPT's `dropout`), and
    those of the configs are set. Layer drop is no dropout: it is turned off at p = 0 and left alone otherwise.
    """
    if p is None:
        return lambda: None
    if not 0.0 <= p < 1.0:
        raise UserError(f"dropout={p}: expected at least 0 and below 1, or null")
    undo: list[Callable[[], None]] = []

    def put(owner: Any, attribute: str, value: float) -> None:
        undo.append(functools.partial(setattr, owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    owners: list[tuple[Any, bool]] = [(module, "Dropout" in type(module).__name__) for module in model.modules()]
    configs = {
        id(m.config): m.config for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)
    }
    owners.extend((config, False) for config in configs.values())
    for owner, is_dropout in owners:
        for attribute, value in list(vars(owner).items()):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if attribute == "layerdrop":
                if p == 0.0:
                    put(owner, attribute, 0.0)
            elif _is_probability(attribute) or (is_dropout and attribute in ("p", "drop_prob")):
                put(owner, attribute, p)

    def restore() -> None:
        while undo:
            undo.pop()()

    return restore


def _is_probability(attribute: str) -> bool:
    return "dropout" in attribute or attribute.endswith("_pdrop") or attribute == "attention_probs_dropout_prob"
