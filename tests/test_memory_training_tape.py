"""The tape: what a small network keeps, in what order its gradients come, and which of them are added in place."""

from hfvram.memory.timeline import Standing, Tag, Timeline
from hfvram.memory.training import operators as op
from hfvram.memory.training.tape import Parameter, Tape
from hfvram.memory.training.tensors import Storage, Tensor, contiguous

X = Tag("x", "inputs")
WORKSPACES = 2 * (32 << 20)  # cuBLAS's, one for each thread


def fresh() -> Tape:
    return Tape(Timeline(Standing(())))


def weight(*shape: int) -> Tensor:
    return Tensor(Storage(), shape, contiguous(shape), "fp32", Parameter(shape, "fp32"))


def live(tape: Tape) -> int:
    t = tape.timeline
    return sum(t.sizes[h] for h in t.live(len(t.events)))


def fullest(tape: Tape, since: int) -> int:
    return max(_levels(tape)[since:])


def _levels(tape: Tape) -> list[int]:
    t, level, levels = tape.timeline, 0, []
    for event in t.events:
        level += t.sizes[event] if event >= 0 else -t.sizes[~event]
        levels.append(level)
    return levels


def test_two_layers_by_hand() -> None:
    """4 rows: 8 wide, 32 wide through ReLU, 1 wide. In fp32: x 128 B, hidden 512 B, its ReLU 512 B, out 16 B."""
    tape = fresh()
    up, down = weight(32, 8), weight(1, 32)
    x = tape.new((4, 8), "fp32", None, X)
    out = op.linear(tape, op.of_output(tape, op.linear(tape, x, up)), down)
    # ReLU keeps its output alone, so that the hidden product is gone; x is kept for the first weight.
    assert live(tape) == 128 + 512 + 16 + WORKSPACES // 2
    before = len(tape.timeline.events)
    tape.backward(out)
    # The gradients: 32·8·4 B and 32·4 B; the output is this function's, the input too.
    assert live(tape) == 128 + 16 + 1024 + 128 + WORKSPACES
    # Fullest at the first weight's gradient: the hidden one's gradient 512 B beside both weights', ReLU's output gone.
    assert fullest(tape, before) == 128 + 16 + 16 + 512 + 128 + 1024 + WORKSPACES
    assert [p.node.grad.shape for p in (up, down)] == [(32, 8), (1, 32)]  # type: ignore[union-attr]


def test_nothing_is_kept_for_a_frozen_weight() -> None:
    tape = fresh()
    frozen = Tensor(Storage(), (8, 8), (8, 1), "fp32")
    x = tape.new((4, 8), "fp32", None, X)
    hidden = op.linear(tape, x, weight(8, 8))
    out = op.linear(tape, hidden, frozen)
    del hidden
    # x for the trained weight, the output; what goes into the frozen one is needed by nobody.
    assert live(tape) == 128 + 128 + WORKSPACES // 2
    assert out.node is not None


def test_a_gradient_is_added_in_place_where_it_is_nobodys_view() -> None:
    def added(view: bool) -> int:
        tape = fresh()
        w = weight(16)
        first = op.reshape(tape, w, 4, 4) if view else w
        product = op.mul(tape, first, first)
        more = op.negative(tape, first)
        total = op.add(tape, op.reshape(tape, product, 16), op.reshape(tape, more, 16))
        tape.backward(total)
        return len(tape.timeline.sizes)

    # Three results, the loss' gradient, two of the product, one of the negative; both sums in place.
    assert added(False) == 3 + 1 + 2 + 1
    assert added(True) == added(False)


def test_a_view_is_not_added_to() -> None:
    """A reshaped gradient has a base that autograd holds: the sum is a new tensor."""

    tape = fresh()
    w = weight(16)
    a, b = op.reshape(tape, w, 4, 4), op.reshape(tape, w, 2, 8)
    total = op.add(tape, op.reshape(tape, op.negative(tape, a), 16), op.reshape(tape, op.negative(tape, b), 16))
    tape.backward(total)
    # Three results, the loss' gradient, those of the two negatives, and their sum.
    assert len(tape.timeline.sizes) == 3 + 1 + 2 + 1


def test_a_checkpoint_keeps_its_input_and_runs_again_up_to_the_last_thing_kept() -> None:
    tape = fresh()
    up, down = weight(32, 8), weight(8, 32)
    x = op.linear(tape, tape.new((4, 8), "fp32", None, X), weight(8, 8))
    out = tape.checkpoint(lambda: op.linear(tape, op.of_output(tape, op.linear(tape, x, up)), down))
    # Of the stretch only the output stands; before it the first input and the first product.
    assert live(tape) == 128 + 128 + 128 + WORKSPACES // 2
    before = len(tape.timeline.sizes)
    tape.backward(out)
    again = [n for n, tag in zip(tape.timeline.sizes, tape.timeline.tags, strict=True)][before:]
    # The root's gradient, then the hidden product and its ReLU; not the last product, which nobody needs.
    assert again[:3] == [128, WORKSPACES // 2, 512]
    assert again.count(512) == 4  # product, ReLU, and the gradient of each
    assert up.node.grad is not None  # type: ignore[union-attr]


def test_broadcast_gradients_are_summed_and_cast_by_the_engine() -> None:
    tape = fresh()
    scale = Tensor(Storage(), (8,), (1,), "bf16", Parameter((8,), "bf16"))
    x = tape.new((4, 8), "fp32", None, X)
    out = op.mul(tape, x, scale)
    tape.backward(out)
    grad = scale.node.grad  # type: ignore[union-attr]
    assert (grad.shape, grad.dtype) == ((8,), "bf16")
