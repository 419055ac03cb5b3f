"""peftbench: parameter-efficient fine-tuning methods, written from scratch and measured alike."""

__version__ = "0.1.0"
