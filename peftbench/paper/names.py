"""How methods, models and contestants are written in the paper; what is not here is written as the suite calls it."""

METHODS = {
    "adalora": "AdaLoRA", "bitfit": "BitFit", "boft": "BOFT", "compacter": "Compacter", "dora": "DoRA",
    "fourierft": "FourierFT", "full": "full fine-tuning", "galore": "GaLore", "head": "head only", "houlsby": "Houlsby",
    "hra": "HRA", "hra_gs": "HRA (orthogonal)", "ia3": "IA3", "layernorm": "LayerNorm", "loha": "LoHa",
    "lokr": "LoKr", "lora": "LoRA", "lora_fa": "LoRA-FA", "lora_plus": "LoRA+", "miss": "MiSS",
    "mpt": "multitask prompt", "oft": "OFT", "oftv2": "OFTv2", "parallel": "parallel adapter", "pfeiffer": "Pfeiffer",
    "pissa": "PiSSA", "prefix": "prefix", "prompt": "prompt", "ptuning": "P-tuning", "ptuning_v2": "P-tuning v2",
    "qlora": "QLoRA", "randlora": "RandLoRA", "relora": "ReLoRA", "road": "RoAd", "rslora": "rsLoRA", "ssf": "SSF",
    "vera": "VeRA",
}  # fmt: skip
MODELS = {
    "minilm-l6": "MiniLM-L6", "smollm2-135m": "SmolLM2-135M", "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.1-8b": "Llama-3.1-8B", "roberta-base": "RoBERTa-base",
}  # fmt: skip
MODES = {"-compiled-graphs": "compiled, graphs", "-compiled": "compiled", "-graphs": "graphs"}
HALVES = {"-bf16": "bf16", "-autocast": "autocast"}


def method(variant: object) -> str:
    """Return a variant with its method's name as its paper writes it: "lora r=8" → "LoRA r=8"."""
    name, space, rest = str(variant).partition(" ")
    return METHODS.get(name, name) + space + rest


def model(name: object) -> str:
    """Return a model's name as its makers write it."""
    return MODELS.get(str(name), str(name))


def contestant(name: str) -> str:
    """Return who competes in words: "hf-lora-bf16-compiled" → "HF PEFT LoRA, bf16, compiled"."""
    if name == "frozen":
        return "frozen model, forward and backward"
    whose, _, rest = name.partition("-")
    said: list[str] = []
    for ending, word in (*MODES.items(), *HALVES.items()):
        if rest.endswith(ending):
            rest = rest.removesuffix(ending)
            said.insert(0, word)
    owner = {"hf": "HF PEFT", "ours": "peftbench"}.get(whose)
    if owner is None:
        return name
    if whose == "hf" and rest == "full":
        owner = "HF"
    eager = ["eager"] if whose == "ours" and not any(word in MODES.values() for word in said) else []
    return ", ".join([f"{owner} {method(rest)}", *said, *eager])
