"""The formula engine: an architecture and a request → the timeline, in milliseconds and without torch."""

from hfvram.memory import inference, seq2seq
from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Timeline
from hfvram.memory.weights import standing
from hfvram.model.architecture import Architecture
from hfvram.request import Request


def timeline(architecture: Architecture, request: Request) -> Timeline:
    """Inference of one request that leaves nothing open (`answer/resolve.py`)."""
    ctx, new, dtype = request.ctx or 1, request.new_tokens or 0, request.dtype
    quant = request.quant if request.quant != "auto" else architecture.quantization or "none"
    t = Timeline(standing(architecture, dtype, quant, request.double_quant))
    f = Forward(
        batch=request.batch,
        tokens=ctx - new if request.phase == "generate" else ctx,
        dtype=dtype,
        attention=request.attention,
        kernels=request.kernels,
        masked=request.padding,
        mask_of_ones=request.phase == "generate",
        quant=quant,
        static_length=ctx - 1 if request.cache == "static" and request.phase == "generate" else 0,
    )
    road = seq2seq if architecture.task == "seq2seq" else inference
    if request.phase == "encode":
        road.encode(t, architecture, f)
    elif request.phase == "prefill" or not new:
        road.prefill(t, architecture, f)
    else:
        road.generate(t, architecture, f, new)
    return t
