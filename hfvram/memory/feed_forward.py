"""Dense feed-forward and mixture of experts, without gradients, as transformers computes them.

b sequences of s tokens, h hidden size, f width, E experts, k chosen for each token, e bytes of an element.
Source: transformers 5.17, models/llama, phi3, mixtral (modeling_*.py) and integrations/moe.py (`grouped_mm_experts_forward`).
"""

from hfvram.memory.blocks import HIDDEN, activate
from hfvram.memory.forward import Forward
from hfvram.memory.timeline import Tag, Timeline
from hfvram.model.layers import FeedForward, MixtureOfExperts

WIDE = Tag("feed-forward, gate and up", "activations", "b·s·f·e", "transformers 5.17: LlamaMLP.forward")
PRODUCT = Tag("feed-forward, product", "activations", "b·s·f·e", "transformers 5.17: LlamaMLP.forward")
ROUTER = Tag("router", "activations", "b·s·E·4", "transformers 5.17: MixtralTopKRouter.forward")
CHOSEN = Tag("experts, tokens by expert", "activations", "b·s·k·h·e", "transformers 5.17: grouped_mm_experts_forward")
EXPERT = Tag("experts, gate and up", "activations", "b·s·k·2·f·e", "transformers 5.17: grouped_mm_experts_forward")
EXPERT_PRODUCT = Tag("experts, product", "activations", "b·s·k·f·e", "transformers 5.17: grouped_mm_experts_forward")


def feed_forward(t: Timeline, f: Forward, part: FeedForward) -> int:
    """down(act(gate)·up) holds three widths at once, down(act(up)) two. Returns the output's handle."""
    width = f.bytes(part.intermediate_size)
    if part.gated and part.fused_gate_up:
        both = t.alloc(2 * width, WIDE)
        act = activate(t, width, part.activation)
        product = t.alloc(width, PRODUCT)
        t.free(act, both)
    elif part.gated:
        gate = t.alloc(width, WIDE)
        act = activate(t, width, part.activation)
        t.free(gate)
        up = t.alloc(width, WIDE)
        product = t.alloc(width, PRODUCT)
        t.free(act, up)
    else:
        up = t.alloc(width, WIDE)
        product = activate(t, width, part.activation)
        t.free(up)
    out = t.alloc(f.bytes(part.hidden_size), HIDDEN)
    t.free(product)
    return out
