"""What serving engines plan at start: weights as they lay them out, then a pool for the cache out of what is left.

`specs.py`: the cache of one layer by kind. `layers.py`: which kind a layer has, on one rank of several. `groups.py`:
how vLLM puts layers into groups of equal pages. `fusing.py`: tensors as the engine fuses, pads and shards them;
`weights.py`: all that stand on a rank. `activations.py`: what vLLM's profiling run takes. `vllm.py`, `sglang.py`: each
engine's plan from `Options` (`options.py`), a `Plan` (`plan.py`). llama.cpp has no pool: `llama_cpp.py` places tensors,
`llama_cache.py` and `llama_compute.py` say what else it allocates, `llama_quant.py` what quantizing makes of a model.

Modelled: vLLM 0.19.0 (V1), SGLang 0.5.23, llama.cpp b10635; files of the first two are named below `vllm/` and
`sglang/srt/`.
"""

MODELLED = {"transformers": "5.17", "vllm": "0.19.0", "sglang": "0.5.23", "llama.cpp": "b10635"}
"""The versions whose code the formulas follow."""
