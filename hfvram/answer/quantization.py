"""What a request says of weights in fewer bits, held against what transformers 5.17 can load, make or train so."""

from typing import Final

from hfvram.errors import HfvramError
from hfvram.memory.bitsandbytes import ON_LOADING
from hfvram.memory.weights import DEQUANTIZED, computed, dequantized, keeps_fp8, scheme_of
from hfvram.model.architecture import Architecture
from hfvram.model.packing import is_known
from hfvram.request import Request

MADE: Final = (*ON_LOADING, "fp8")
"""What transformers makes of any model while it loads it."""
AS_IF: Final = ("gptq-4", "awq-4")
"""Made beforehand with data: the answer is for a checkpoint in that format."""
OTHER_EXPERTS: Final = ("llama4", "llama4_text")
"""Types whose experts are called otherwise than transformers' own for fp8."""
LOADERS: Final = (
    *("awq", "bitsandbytes", "gptq", "aqlm", "quanto", "quark", "fouroversix", "fp_quant", "eetq", "higgs", "hqq"),
    *("compressed-tensors", "fbgemm_fp8", "torchao", "bitnet", "vptq", "spqr", "fp8", "mxfp8", "auto-round", "mxfp4"),
    *("metal", "sinq", "gemma"),
)
"""`quant_method` of the checkpoints that it loads (quantizers/auto.py); `nvfp4` it makes, but does not load."""


def check(architecture: Architecture, request: Request) -> list[str]:
    """Warnings about the weights' format. Raises `usage` where there is no such thing, and says what would be valid."""
    own, asked = architecture.quantization or "none", request.quant
    if own != "none" and asked in ("auto", own):
        return [_stored(architecture, own, request)]
    if own != "none" and asked != "none":
        raise HfvramError("usage", f"--quant {asked}: the checkpoint is {own} already, valid are auto and none")
    if asked in ("auto", "none", *ON_LOADING):
        return []
    simulated = request.method == "simulate"
    valid = ("none", *MADE, *(() if simulated else AS_IF))
    if asked == "mxfp4" and architecture.model_type == "gpt_oss" and not simulated:
        return ["the experts in MXFP4 as with the kernels for it installed: without them they are dequantized"]
    if asked not in valid or (request.mode != "inference" and asked not in ON_LOADING):
        training = request.mode != "inference"
        words = ", ".join(("none", *ON_LOADING) if training else valid)
        only = "transformers makes mxfp4 of gpt-oss alone, " if asked == "mxfp4" else ""
        hint = " (others with --method formula)" if simulated and asked in AS_IF and not training else ""
        raise HfvramError("usage", f"--quant {asked} with --mode {request.mode}: {only}valid are {words}{hint}")
    if asked == "fp8" and not keeps_fp8(request):
        raise HfvramError("usage", "--quant fp8 needs a GPU of compute capability 8.9: valid are nf4, fp4 and int8")
    if asked == "fp8" and any(p.kind == "experts" and p.name.endswith("bias") for p in architecture.all_params):
        raise HfvramError("usage", "--quant fp8: transformers' fp8 experts have no biases, valid is --quant none")
    if asked == "fp8" and architecture.moe and architecture.model_type in OTHER_EXPERTS:
        raise HfvramError("usage", f"--quant fp8: its fp8 experts can't run {architecture.class_name}, valid is none")
    if asked in AS_IF:
        kind = asked.partition("-")[0].upper()
        return [f"as if the checkpoint were {kind} in 4 bits, groups of 128: embeddings, head and norms stay whole"]
    return []


def _stored(architecture: Architecture, own: str, request: Request) -> str:
    """What is assumed of a checkpoint that is quantized already. Raises `usage` for one of unknown size."""
    scheme = scheme_of(architecture, own)
    dtype = architecture.dtype if request.dtype == "auto" else request.dtype
    if own in DEQUANTIZED:
        return f"{own} weights count as transformers loads them without kernels for them: in the computing dtype"
    if own == "fp8" and computed(architecture, request.with_(quant=own)) == "none" and scheme.loader == "fp8":
        return f"a GPU below compute capability 8.9 has no fp8: transformers turns the weights into {dtype}"
    if dequantized(architecture, own):
        return f"{own} weights of {scheme.loader} count in {dtype}: transformers unpacks them at the first pass"
    if not architecture.stored_sizes and not is_known(scheme):
        raise HfvramError(
            "usage",
            f"quantization {own} is not supported yet without the headers of its files: "
            "--quant none answers for the model in its own dtype",
        )
    if not is_known(scheme):
        return f"quantization {own} is not known here: weights count as they are stored, whatever is made of them"
    if scheme.loader not in LOADERS:
        said = scheme.loader or "its tool"
        return f"the checkpoint is {own}: weights as stored, though transformers has no loader for those of {said}"
    return f"the checkpoint is {own}: weights as stored, without what its kernels need for a moment"
