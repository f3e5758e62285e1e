"""Run a statically dropped folder as vLLM does by default, compiled, and compare with transformers.

In a process of its own: where an engine has run eagerly before, nothing is compiled.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.pop("TORCH_COMPILE_DISABLE", None)
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    import torch
    from served_models import generate, load, prompts, require_equal, served

    folder, asked = Path(sys.argv[1]), prompts()
    with served(folder) as engine:
        assert engine.llm_engine.vllm_config.compilation_config.backend == "inductor"
        answers = generate(engine, asked)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    require_equal(load(folder), asked, answers)
