"""Tests that need vLLM: run.sh makes their environment. Elsewhere they are not collected.

vLLM's second model runner, the default on GPUs, is written in Triton. With
VLLM_USE_V2_MODEL_RUNNER=1 the tests run it on a CPU by Triton's interpreter, which is slow.
"""

import importlib.util
import os

# One process, so that a failure shows where it is; nothing is compiled for models this small.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import Backend, backends

    class InterpretedDriver:
        """What vLLM asks of a Triton for CPUs before it uses one."""

        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = Backend(compiler=None, driver=InterpretedDriver)
