"""What vLLM must learn of an architecture before its first start, learnt in a fork.

vLLM inspects a model's class in a fresh process (8 s of imports) and keeps the result under VLLM_CACHE_ROOT.
A child of the zygote is such a process too, with the imports paid: it inspects in place.
"""

from __future__ import annotations

import sys


def module_of(architecture: str) -> str:
    """The module of an architecture's class. Raises LookupError if vLLM does not know it."""
    from vllm import ModelRegistry

    entry = ModelRegistry.models.get(architecture)
    module = getattr(entry, "module_name", None)
    if module is None:
        raise LookupError(f"vLLM does not know {architecture}")
    return str(module)


def inspect_architecture(architecture: str) -> int:
    """Fill vLLM's cache for an architecture. Only in a child that exits afterwards; returns its exit status."""
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    try:
        module_of(architecture)
    except LookupError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    registry._run_in_subprocess = lambda work: work()  # this is the subprocess
    ModelRegistry.models[architecture].inspect_model_cls()
    return 0
