"""Tests that need llama.cpp: gguf.sh makes their environment. Elsewhere they are not collected."""

import importlib.util

if importlib.util.find_spec("llama_cpp") is None:
    collect_ignore_glob = ["test_*.py"]
