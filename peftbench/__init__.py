"""peftbench: parameter-efficient fine-tuning methods, written from scratch and measured alike.

adapter = peftbench.attach(model, "lora", rank=8, targets=["attention.query", "attention.value"])
adapter.save("folder")
peftbench.load_adapter(model, "folder")
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from peftbench.methods.adapter import Adapter, attach, load_adapter

__all__ = ["Adapter", "__version__", "attach", "load_adapter"]


def __getattr__(name: str) -> Any:
    # PyTorch is imported on first use: planning, storing and analysing need none of it.
    if name in ("Adapter", "attach", "load_adapter"):
        from peftbench.methods import adapter

        return getattr(adapter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
