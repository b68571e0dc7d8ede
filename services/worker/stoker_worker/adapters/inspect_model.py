"""Pay the first start of an architecture: vLLM inspects its class in a process and keeps what it learnt.

    python -m stoker_worker.adapters.inspect_model LlamaForCausalLM

Exits 3 if vLLM does not know the architecture.
"""

from __future__ import annotations

import sys


def main() -> int:
    from vllm import ModelRegistry

    architecture = sys.argv[1]
    entry = ModelRegistry.models.get(architecture)
    if entry is None:
        sys.stderr.write(f"vLLM does not know {architecture}\n")
        return 3
    entry.inspect_model_cls()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
