"""Load a folder into a vLLM that does not load megaskip's plugin; prints the error."""

import os
import sys

if __name__ == "__main__":
    os.environ["VLLM_PLUGINS"] = "none"
    from vllm import LLM

    options = {"trust_remote_code": True} if sys.argv[2:] else {}
    try:
        LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, **options)
    except Exception as error:
        print(error)
