"""Plugin of vLLM: folders of `megaskip convert` and `megaskip export-static` as vLLM runs them."""
