"""What every op owes in every backend: it equals the recurrence, never reads padding, and goes on where it stopped.

The Triton kernels run in Triton's interpreter where there is no GPU, at the smallest sizes that cross a block's border.
"""

import contextlib
import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from cald_speech import ops
from cald_speech.ops import OPS, mask_padding
from tests.helpers import NO_NATIVE, TOLERANCE, flip_valid, needs_native, relative_error
from tests.ops.cases import (
    CARRYING,
    CHANNELS,
    FRAMEWISE,
    SCANS,
    STEPS,
    Way,
    assert_same,
    bits_differ,
    call,
    exact,
    exact_of,
    is_framewise,
    like_output,
    make_inputs,
    run,
)

SMALL = {"batch": 2, "groups": 1, "heads": 1}
SEVERAL_BLOCKS = {"chunk_size": 16}
PER_CHANNEL = {"per_channel": True}
WAYS = [
    *(Way(op, "naive", frames=20) for op in OPS),
    Way("gated_delta", "naive", "per channel", frames=20, sizes=PER_CHANNEL),
    Way("ssd", "torch", "by blocks", borders=(1, 63, 64, 65, 1000)),
    Way("ssd", "torch", "whole batch", borders=(1, 63, 64, 65, 1000)),
    Way("ssd_bidirectional", "torch", "by blocks", borders=(1, 65, 130)),
    Way("ssd_bidirectional", "torch", "whole batch", borders=(1, 65)),
    Way("ssd_pair", "torch", "by blocks", borders=(1, 65, 130)),
    Way("selective_scan", "torch", borders=(1, 15, 16, 17, 300), options=SEVERAL_BLOCKS),
    Way("gated_delta", "torch", borders=(1, 63, 64, 65, 130)),
    Way("gated_delta", "torch", "per channel", borders=(1, 7, 8, 9, 33, 65), sizes=PER_CHANNEL),
    Way("short_conv", "torch", borders=(1, 2, 3, 4, 63, 64, 65, 300)),
    Way("ssd", "native", borders=(1, 63, 64, 65, 1000)),
    Way("ssd_bidirectional", "native", borders=(1, 65, 130)),
    Way("ssd_pair", "native", borders=(1, 65, 130)),
    Way("selective_scan", "native", borders=(1, 63, 64, 65, 300), options=SEVERAL_BLOCKS),
    Way("gated_delta", "native", borders=(1, 31, 32, 33, 300)),
    Way("gated_delta", "native", "per channel", borders=(1, 33, 65), sizes=PER_CHANNEL),
    Way("short_conv", "native", borders=(1, 2, 3, 4, 63, 64, 65, 300)),
    Way("ssd", "triton", borders=(1, 32, 65), frames=33, sizes=SMALL),
    Way("ssd_bidirectional", "triton", borders=(1, 65), frames=33, sizes=SMALL),
    Way("ssd_pair", "triton", borders=(1, 33), frames=33, sizes=SMALL),
    Way("selective_scan", "triton", borders=(1, 4, 9), frames=5, sizes={"batch": 2, "groups": 1, "channels": 4}),
    # A decay a head: test_triton.py.
    Way("gated_delta", "triton", "per channel", borders=(1, 17), frames=17, sizes=SMALL | PER_CHANNEL),
    Way("short_conv", "triton", borders=(1, 16, 18), frames=18, sizes={"batch": 2}),
]


def ways(*, ops=tuple(OPS), but=(), wide=(), **cases):
    """Parametrise with the ways through some ops, without some backends.

    wide : of which ops the interpreter is asked by `make test-all` alone: their kernels have many steps.
    cases : one more parameter by its name, as (values, those that Triton's interpreter is asked for as well).
    """
    (name, (every, few)) = next(iter(cases.items()), (None, ([None], [None])))
    chosen = [
        pytest.param(
            *((one, value) if name else (one,)),
            id=f"{one}, {value}" if name else str(one),
            marks=[
                *([needs_native] if one.backend == "native" else []),
                *([pytest.mark.wide] if one.backend == "triton" and one.op in wide else []),
            ],
        )
        for one in WAYS
        if one.op in ops and one.backend not in but
        for value in (few if one.backend == "triton" else every)
    ]
    return pytest.mark.parametrize(["way", name] if name else ["way"], chosen, indirect=["way"])


def both_ways(op):
    return [{"reverse": False}, {"reverse": True}] if op in CARRYING else [{}]


def every_way(way):
    """Both directions, but for kernels in the interpreter in which they differ by the order of the frames alone."""
    if way.op == "gated_delta" and way.backend == "triton":
        return [{"reverse": True}]
    return both_ways(way.op)


def some_ways(way, reverse):
    """Both directions or, in the interpreter, which takes milliseconds for every program, one."""
    return [{"reverse": reverse}] if way.backend == "triton" and way.op in CARRYING else both_ways(way.op)


def lengths_of(way, num_frames=None):
    num_frames = way.frames if num_frames is None else num_frames
    return torch.tensor([num_frames, 2 * num_frames // 3, 0])[: dict(way.sizes).get("batch", 3)]


def exact_like(way, num_frames, lengths, options, **sizes):
    """What the recurrence gives of the way's inputs; worked out once."""
    sizes = tuple(sorted((dict(way.sizes) | sizes).items()))
    lengths = None if lengths is None else tuple(lengths.tolist())
    return exact_of(way.op, num_frames, sizes, lengths, tuple(options.items()))


@ways(but=("naive",))
@pytest.mark.parametrize("padded", [False, True], ids=["full", "with lengths"])
def test_equals_the_recurrence_at_borders_of_blocks(way, padded):
    for num_frames in way.borders:
        lengths = lengths_of(way, num_frames) if padded else None
        for options in some_ways(way, reverse=padded):
            actual = way.run(way.inputs(num_frames), lengths, **options)
            assert_same(actual, exact_like(way, num_frames, lengths, options))


# Groups, None for one for each unit, and the inputs that are left out.
OPTIONS = [(1, ()), (1, ("D", "bias")), (2, ("initial_state",)), (None, ("D", "bias", "initial_state"))]


@ways(but=("naive",), wide=("gated_delta",), case=(OPTIONS, OPTIONS[1::2]))
def test_equals_the_recurrence_with_groups_and_options(way, case):
    """In the interpreter two heads: one group or a group each."""
    groups, left_out = case
    heads = 2 if way.backend == "triton" else 4
    units = dict(way.sizes).get("channels", CHANNELS) if way.op == "selective_scan" else heads
    sizes = {"groups": groups or units, "heads": units, "left_out": left_out}
    for options in some_ways(way, reverse=True):
        actual = way.run(way.inputs(**sizes), lengths_of(way), **options)
        assert_same(actual, exact_like(way, way.frames, lengths_of(way), options, **sizes))


FILTERS = [(1, "silu"), (2, "identity"), (5, "silu"), (18, "identity")]


@ways(ops=("short_conv",), case=(FILTERS, FILTERS[:3]))
def test_filters_of_every_length(way, case):
    """None before the present frame, fewer than a tile, more; longer than a block, which Triton refuses."""
    taps, activation = case
    sizes = {"taps": taps} | ({"left_out": ("initial_state",)} if taps == 1 else {})
    for options in both_ways(way.op):
        options |= {"activation": activation}
        lengths = torch.tensor([40, 2, 0])
        actual = way.run(way.inputs(40, batch=3, **sizes), lengths, **options)
        assert_same(actual, exact_like(way, 40, lengths, options, batch=3, **sizes))


@ways(ops=CARRYING, but=("naive", "native", "triton"))
def test_gradients_against_finite_differences(way):
    for options in both_ways(way.op):
        inputs = way.inputs(5, batch=2, heads=2, head_dim=2, channels=4, groups=2, d_state=2)
        leaves = {name: v.double().requires_grad_() for name, v in inputs.items()}
        options |= {"lengths": torch.tensor([5, 3])} | ({"chunk_size": 2} if way.op in SCANS else {})

        def function(*values, options=options, names=tuple(leaves)):
            return tuple(call(way.op, dict(zip(names, values, strict=True)), "torch", **options).values())

        assert torch.autograd.gradcheck(function, list(leaves.values()))


@ways(but=("triton",))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("float32_parameters", [False, True], ids=["all half", "streams half"])
def test_half_precision_inputs(way, dtype, float32_parameters):
    """Arithmetic is float32 whatever comes in; what comes out has the dtype of x, and each gradient its input's.

    Triton's, which multiply in half precision, are in test_triton.py.
    """
    kept = ("dt", "A", "D", "beta", "g", "weight", "bias", "initial_state") if float32_parameters else ()
    inputs = {name: v if name.split()[0] in kept else v.to(dtype) for name, v in way.inputs().items()}
    actual, expected = way.run(inputs, lengths_of(way)), exact(way.op, inputs, lengths_of(way))
    assert all(v.dtype == dtype for name, v in actual.items() if name.startswith("y"))
    assert all(actual[f"gradient of {name}"].dtype == v.dtype for name, v in inputs.items())
    assert_same(actual, expected, TOLERANCE[str(dtype).removeprefix("torch.")])
    if way.op in SCANS and "state" in actual:
        assert actual["state"].dtype == torch.float32
        assert relative_error(actual["state"], expected["state"]) <= TOLERANCE["parity"]


@ways(but=("triton",))
def test_autocast_changes_nothing(way):
    inputs = {name: v.to(way.device) for name, v in way.inputs().items()}
    expected = way.call(inputs)
    with torch.autocast(way.device, dtype=torch.bfloat16):
        actual = way.call(inputs)
    assert all(v.dtype == torch.float32 for v in actual.values()) and bits_differ(actual, expected) == []


@ways(ops=SCANS, but=("naive",))
@pytest.mark.parametrize("strength", [1e-6, 1.0, 50.0])
def test_decays_from_none_to_total(way, strength):
    """dt |A| up to 50 a frame: log decays sum to 3,200 in a chunk, whose exp underflows and must not overflow."""
    num_frames = way.frames if way.backend == "triton" else 200
    for options in some_ways(way, reverse=strength > 1):
        actual = way.run(way.inputs(num_frames, batch=1, strength=strength), **options)
        assert_same(actual, exact_like(way, num_frames, None, options, batch=1, strength=strength))


@ways(ops=("gated_delta",), but=("naive",))
def test_keys_that_are_all_alike(way):
    """As neighbouring frames of speech nearly are: the series for the inverse of a chunk of them has terms of 10^8."""
    inputs = way.inputs(40, batch=1, groups=1, heads=1)
    inputs |= {"k": inputs["k"][:, :1].expand_as(inputs["k"]), "beta": torch.ones_like(inputs["beta"])}
    inputs["g"] = torch.zeros_like(inputs["g"])
    assert_same(way.run(inputs), exact(way.op, inputs))


@ways(ops=("selective_scan",), but=("naive",))
def test_gradients_of_total_forgetting_keep_their_size(way):
    """Decays near exp(-30): the gradient of A is some 1e-13, and nothing larger may be subtracted on the way to it."""
    inputs = way.inputs()
    inputs |= {"dt": torch.ones_like(inputs["dt"]), "A": torch.full_like(inputs["A"], -30.0)}
    assert_same(way.run(inputs), exact(way.op, inputs))


@ways()
def test_padding_is_never_read(way):
    """Neither that of the inputs nor, backwards, that of the output's gradient; and it comes out as zeros."""
    batch = dict(way.sizes).get("batch", 3)
    inputs, some = way.inputs(), way.frames // 2
    lengths = torch.tensor([way.frames, some, 0])[-batch:]
    padding = torch.arange(way.frames) >= lengths[:, None]
    poisoned = {name: v.clone() for name, v in inputs.items()}
    for name in filter(is_framewise, poisoned):
        poisoned[name][padding] = torch.nan
    for options in every_way(way):
        clean = way.run(inputs, lengths, **options)
        actual = way.run(poisoned, lengths, poisoned=padding, **options)
        assert bits_differ(actual, clean) == []
        for name, v in actual.items():
            if name.startswith("y") or is_framewise(name.removeprefix("gradient of ")):
                assert not v[padding].any(), name
        if "state" in actual:
            assert torch.equal(actual["state"][-1], inputs["initial_state"][-1])


BAD = [{name: value} for name in FRAMEWISE for value in (torch.nan, torch.inf)]
# Finite numbers whose products are not.
TOO_LARGE = dict.fromkeys(("x", "dt", "B", "C", "k", "v", "beta"), 3e38)
ALL_BAD = [{name: (torch.nan, torch.inf)[k % 2] for k, name in enumerate(FRAMEWISE)}]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@ways()
def test_a_bad_frame_changes_no_other_sequence_and_nothing_before_it(way):
    """A sequence for each input and value, with one number of one frame bad; every other sequence has none.

    The last frame is padding, which stays zero whatever a state holds. In the interpreter one sequence has them all,
    and there are no gradients: its programs share no scratch.
    """
    one_at_a_time = way.backend != "triton"
    inputs = {name.split()[0] for name in way.inputs()}
    bad = [case for case in (BAD if one_at_a_time else ALL_BAD) if inputs & case.keys()]
    if one_at_a_time and way.op in SCANS:
        bad.append(TOO_LARGE)
    batch, frame = 2 * len(bad), way.frames // 2
    clean = {name: v.to(way.device) for name, v in way.inputs(batch=batch).items()}
    spoilt = {name: v.clone() for name, v in clean.items()}
    for sequence, case in zip(range(0, batch, 2), bad, strict=True):
        for name in (name for name in clean if name.split()[0] in case):
            spoilt[name][sequence, frame].view(-1)[-1] = case[name.split()[0]]
    lengths = torch.full((batch,), way.frames - 1, device=way.device)
    for options in every_way(way):
        actual, expected = ((way.run if one_at_a_time else way.call)(v, lengths, **options) for v in (spoilt, clean))
        others = {name: v[1::2] for name, v in expected.items() if v.size(0) == batch}
        assert bits_differ({name: actual[name][1::2] for name in others}, others) == []
        for name in (name for name in expected if name.startswith("y")):
            assert not actual[name][::2, frame].isfinite().flatten(1).all(1).any(), "it hides what is bad"
            assert not actual[name][:, -1].any(), "it spoils padding"
            if way.op == "ssd_bidirectional":
                continue  # every frame sees every other
            after = options.get("reverse") or name == "y future"
            before = slice(frame + 1, None) if after else slice(0, frame)
            assert torch.equal(actual[name][:, before], expected[name][:, before]), name


@ways(ops=CARRYING, wide=("gated_delta",))
def test_reverse_is_flipping_within_valid_frames(way):
    inputs, lengths = way.inputs(), torch.tensor([way.frames, way.frames - 4, 1])
    lengths = lengths[-dict(way.sizes).get("batch", 3) :]
    flipped = {name: flip_valid(v, lengths) if is_framewise(name) else v for name, v in inputs.items()}
    actual, expected = way.run(inputs, lengths, reverse=True), way.run(flipped, lengths)
    assert relative_error(actual["y"], flip_valid(expected["y"], lengths)) <= TOLERANCE["rounding"]
    assert relative_error(actual["state"], expected["state"]) <= TOLERANCE["rounding"]


@ways(ops=CARRYING, cut=(["half-way", "after one frame", "before the last"], ["half-way"]))
def test_pieces_equal_the_whole(way, cut):
    inputs, frames = way.inputs(), way.frames
    cut = {"half-way": frames // 2, "after one frame": 1, "before the last": frames - 1}[cut]
    inputs, lengths = {name: v.to(way.device) for name, v in inputs.items()}, lengths_of(way).to(way.device)
    pieces = [(slice(0, cut), lengths.clamp(max=cut)), (slice(cut, frames), (lengths - cut).clamp(min=0))]
    for options in every_way(way):
        expected = way.call(inputs, lengths, **options)
        outputs, state = [], inputs["initial_state"]
        for part, valid in reversed(pieces) if options["reverse"] else pieces:
            piece = {name: v[:, part] if is_framewise(name) else v for name, v in inputs.items()}
            made = way.call(piece | {"initial_state": state}, valid, **options)
            state = made["state"]
            outputs.append(made["y"])
        y = torch.cat(outputs[::-1] if options["reverse"] else outputs, dim=1)
        assert relative_error(y, expected["y"]) <= TOLERANCE["rounding"]
        assert relative_error(state, expected["state"]) <= TOLERANCE["rounding"]


@ways(ops=SCANS, but=("naive", "triton"))
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunk_size_does_not_matter(way, chunk_size):
    """Of Triton's the selective scan alone listens to it: test_triton.py."""
    for options in both_ways(way.op):
        actual = way.run(way.inputs(), lengths_of(way), **options, chunk_size=chunk_size)
        assert_same(actual, exact_like(way, way.frames, lengths_of(way), options))


@ways()
def test_no_frames(way):
    inputs = way.inputs(0)
    for options in every_way(way):
        actual = way.run(inputs, **options)
        for name in (name for name in actual if name.startswith("y")):
            assert actual[name].shape == inputs[name.replace("y", like_output(way.op))].shape
        if "state" in actual:
            assert torch.equal(actual["state"], inputs["initial_state"])
            assert actual["gradient of initial_state"].any()
            assert not any(actual[f"gradient of {name}"].any() for name in inputs if name != "initial_state")


@ways(but=("naive",), wide=("gated_delta",))
def test_slices_of_wider_tensors_and_twice_the_same(way):
    """Slices of one projection, as a mixer has them, whose other columns are never read; and nothing contiguous."""
    inputs = way.inputs(batch=1 if way.backend == "triton" else 3)
    expected = way.run(inputs)
    strided = {name: v.transpose(0, -1).contiguous().transpose(0, -1) for name, v in inputs.items()}
    for name, v in inputs.items():
        if is_framewise(name):
            wide = torch.full((*v.shape[:-1], v.size(-1) + 3), torch.nan)
            wide[..., 2:-1] = v
            strided[name] = wide[..., 2:-1]
    assert_same(way.run(strided), expected, TOLERANCE["rounding"])
    assert bits_differ(way.run(inputs), expected) == []
    negated = {name: torch._neg_view(-v.to(way.device)) for name, v in inputs.items()}  # torch has the sign, not memory
    outputs = {name: v.cpu() for name, v in way.call(negated).items()}
    assert bits_differ(outputs, {name: expected[name] for name in outputs}) == []


@ways(but=("triton",))
def test_only_what_is_asked_for_gets_a_gradient(way):
    other = {"gated_delta": "beta", "short_conv": "weight"}.get(way.op, "dt")
    for chosen in (like_output(way.op), other):
        inputs = {name: v.to(way.device) for name, v in way.inputs(9).items()}
        asked = [name for name in inputs if name.split()[0] == chosen]
        for name in asked:
            inputs[name].requires_grad_()
        sum(v.sum() for v in way.call(inputs).values()).backward()
        assert [name for name, v in inputs.items() if v.grad is not None] == asked


@ways(but=("naive", "torch", "triton"))
@pytest.mark.parametrize("axis", [0, 1], ids=["sequences", "frames"])
def test_offsets_past_two_to_the_31(way, axis):
    """So far apart that no 32-bit offset reaches, in memory that is only touched where they lie; Triton's elsewhere."""
    inputs, apart = way.inputs(2, batch=2 - axis), 2**31 + 8
    for name in [name for name in inputs if name.startswith(like_output(way.op))]:
        v = inputs[name]
        strides = [apart if i == axis else stride for i, stride in enumerate(v.stride())]
        far = torch.empty(apart + v[0].numel()).as_strided(v.shape, strides).copy_(v)
        for options in both_ways(way.op):
            assert bits_differ(way.run(inputs | {name: far}, **options), way.run(inputs, **options)) == []


WRONG = [
    ("x", lambda v: v.flatten(-2)),
    ("x", lambda v: v.to_sparse()),
    ("x", lambda v: v.to(torch.float8_e4m3fn)),
    ("x", lambda v: v[:, :, :0]),
    ("B", lambda v: v[..., :0]),
    ("C", lambda v: v.to(torch.float8_e4m3fn)),
    ("C", lambda v: FakeTensorMode().from_tensor(v)),
    ("x", lambda v: v.long()),
    ("dt", lambda v: torch.cat([v, v], dim=-1)),
    ("A", lambda v: v[..., None]),
    ("A", lambda v: v.long()),
    ("B", lambda v: v[:, :, 0]),
    ("B", lambda v: torch.cat([v, v, v[:, :, :1]], dim=2)),
    ("B", lambda v: v[:, 1:]),
    ("C", lambda v: torch.cat([v, v], dim=-1)),
    ("D", lambda v: v[:, None]),
    ("D", lambda v: v.to("meta")),
    ("q", lambda v: v[:, :, 0]),
    ("k", lambda v: v[:, :, 0]),
    ("k", lambda v: torch.cat([v, v, v[:, :, :1]], dim=2)),
    ("k", lambda v: v.long()),
    ("v", lambda v: v.flatten(-2)),
    ("v", lambda v: v.long()),
    ("beta", lambda v: v[..., None]),
    ("beta", lambda v: v.to("meta")),
    ("g", lambda v: v[:, 1:]),
    ("g", lambda v: torch.stack([v, v], dim=-1)),
    ("weight", lambda v: v[:, None]),
    ("weight", lambda v: v[1:]),
    ("weight", lambda v: v[:, :0]),
    ("weight", lambda v: v.to("meta")),
    ("bias", lambda v: v[1:]),
    ("initial_state", lambda v: v.transpose(1, 2)),
    ("initial_state", lambda v: v.to("meta")),
    ("lengths", torch.tensor([1, 2])),
    ("lengths", torch.tensor([1, 2, 8])),
    ("lengths", torch.tensor([1, 2, -1])),
    ("lengths", torch.ones(3, dtype=torch.long, device="meta")),
    ("lengths", [1, 2, 3]),
    ("chunk_size", 0),
    ("chunk_size", -1),
    ("chunk_size", 1.5),
    ("chunk_size", True),
    ("activation", "relu"),
    ("backend", "cuda"),
    ("backend", "mamba_ssm"),
    ("backend", []),
]


@pytest.mark.parametrize("op", OPS)
def test_wrong_arguments_are_named(op):
    inputs, accepted = make_inputs(op, 7), inspect.signature(getattr(ops, op)).parameters
    tried = []
    for name, value in WRONG:
        if name not in accepted:
            continue
        arguments = {"backend": "auto"} | {name: value}
        if callable(value):  # of a pair, both
            arguments = {"backend": "auto"} | {key: value(v) for key, v in inputs.items() if key.split()[0] == name}
        given = inputs | {key: v for key, v in arguments.items() if isinstance(v, torch.Tensor) and key != "lengths"}
        options = {key: v for key, v in arguments.items() if key not in given}
        with pytest.raises(ValueError, match=rf"^(dt, )?{name}: .*expected"):
            call(op, given, **options)
        tried.append(name)
    assert set(accepted) - set(tried) <= {"reverse", "return_final_state"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "other", [torch.Tensor.tolist, torch.Tensor.numpy, lambda v: None], ids=["list", "array", "none"]
)
def test_what_is_no_tensor_is_refused_by_name(op, other):
    inputs = make_inputs(op, 5)
    for name in inputs:
        if other(inputs[name]) is None and name.split()[0] in ("D", "bias", "initial_state"):
            continue
        with pytest.raises(ValueError, match=rf"^{name.split()[0]}: expected a (tensor|pair of tensors)"):
            call(op, inputs | {name: other(inputs[name])}, "auto")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_shapes_alone(op, fake):
    """Tensors without values go to the recurrence under auto, which looks at none; others refuse them."""
    inputs, lengths, mode = make_inputs(op, 5), torch.tensor([5, 2, 0]), FakeTensorMode()
    expected = run(op, inputs, "naive", lengths=lengths)
    with mode if fake else contextlib.nullcontext():
        there = mode.from_tensor if fake else lambda v: v.to("meta")
        inputs, lengths = {name: there(v).requires_grad_() for name, v in inputs.items()}, there(lengths)
        outputs = call(op, inputs, "auto", lengths=lengths)
        sum(v.sum() for v in outputs.values()).backward()
    assert {name: v.shape for name, v in outputs.items()} == {name: expected[name].shape for name in outputs}
    assert all(v.grad.shape == v.shape for v in inputs.values())
    for backend in OPS[op].keys() & {"native", "torch"}:
        with pytest.raises(ValueError, match=rf"^backend: {op} cannot run with '{backend}' here: .*meta"):
            call(op, inputs, backend)


@ways(ops=CARRYING, but=("naive", "triton"))
def test_lengths_that_change_before_the_backward_pass(way):
    """Through an alias, of which torch knows nothing: C would write beyond its memory."""
    leaves = {name: v.requires_grad_() for name, v in way.inputs().items()}
    found = []
    for after in (lengths_of(way), torch.full((3,), 2**40)):
        lengths = lengths_of(way)
        y = sum(v.sum() for v in way.call(leaves, lengths).values())
        lengths.numpy()[:] = after
        found.append(dict(zip(leaves, torch.autograd.grad(y, list(leaves.values())), strict=True)))
    assert bits_differ(*found) == []


@ways(but=("triton",))
def test_forward_mode_is_refused_by_all_but_the_recurrence(way):
    inputs = way.inputs(4)
    name = next(iter(inputs))
    with forward_ad.dual_level():
        dual = inputs | {name: forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))}
        if way.backend != "naive":
            with pytest.raises(ValueError, match=r"no forward-mode derivative .* backend='naive'"):
                way.call(dual)
            return
        tangent = forward_ad.unpack_dual(sum(v.sum() for v in way.call(dual).values())).tangent
    leaf = inputs[name].clone().requires_grad_()
    sum(v.sum() for v in way.call(inputs | {name: leaf}).values()).backward()
    assert tangent.item() == pytest.approx(leaf.grad.sum().item(), rel=1e-4)


SIGNS = [("dt", 0.0), ("dt", -1.0), ("dt", torch.nan), ("A", 0.0)]
DELTA_SIGNS = [("beta", -0.1), ("beta", 2.1), ("beta", torch.nan), ("g", 0.1), ("g", torch.nan)]


@pytest.mark.parametrize(
    ("op", "argument", "value"),
    [(op, *case) for op in SCANS for case in (DELTA_SIGNS if op == "gated_delta" else SIGNS)],
)
def test_signs_are_checked_in_debug_mode_at_valid_frames(op, argument, value, monkeypatch):
    inputs, lengths = make_inputs(op, 6), torch.tensor([6, 4, 0])
    for name in [name for name in inputs if name.split()[0] in STEPS]:
        inputs[name][1, 4:] = 1.0 if name == "g" else -1.0
    call(op, inputs, "torch", lengths=lengths)
    monkeypatch.setenv("CALD_SPEECH_DEBUG", "1")
    call(op, inputs, "torch", lengths=lengths)
    spoilt = inputs[next(name for name in inputs if name.startswith(argument))]
    (spoilt[1, 3] if argument in STEPS else spoilt)[...] = value
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        call(op, inputs, "torch", lengths=lengths)


@pytest.mark.parametrize("op", OPS)
def test_auto_is_the_first_that_can_run(op):
    inputs = make_inputs(op, 65)
    fastest = "torch" if NO_NATIVE else "native"
    exact_inputs = {name: v.double() for name, v in inputs.items()}
    assert bits_differ(call(op, inputs, "auto"), call(op, inputs, fastest)) == []
    assert bits_differ(call(op, exact_inputs, "auto"), call(op, exact_inputs, "torch")) == []


@pytest.mark.parametrize("op", SCANS)
def test_masking_the_input_is_giving_lengths(op):
    """What makes padding cheap: a frame whose steps and x are 0 leaves the state alone, in either direction."""
    inputs, lengths = make_inputs(op, 20), torch.tensor([20, 7, 0])
    zeros = (like_output(op), *STEPS)
    masked = {name: mask_padding(v, lengths) if name.split()[0] in zeros else v for name, v in inputs.items()}
    for options in both_ways(op):
        actual, expected = call(op, inputs, "auto", lengths=lengths, **options), call(op, masked, "auto", **options)
        for name in (name for name in actual if name.startswith("y")):
            assert relative_error(actual[name], mask_padding(expected[name], lengths)) <= TOLERANCE["rounding"]


@ways(ops=("short_conv",))
def test_is_torchs_depthwise_convolution(way):
    inputs = way.inputs()
    x = torch.cat([inputs["initial_state"], inputs["x"].transpose(1, 2)], dim=-1)
    expected = torch.nn.functional.conv1d(x, inputs["weight"][:, None], inputs["bias"], groups=CHANNELS)
    actual = way.run(inputs, activation="identity")["y"]
    assert relative_error(actual, expected.transpose(1, 2)) <= TOLERANCE["rounding"]


@pytest.mark.parametrize(("name", "axis"), [("dt", 2), ("A", 0)])
def test_the_direction_axis_is_asked_for(name, axis):
    inputs = make_inputs("ssd_bidirectional", 5)
    inputs[name] = inputs[name].select(axis, 0)
    with pytest.raises(ValueError, match=r"dt, A: expected a direction axis of 2"):
        ops.ssd_bidirectional(**inputs)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D"])
@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda past, future: past, r"Tensor"),
        (lambda past, future: (past,), r"1 of them"),
        (lambda past, future: (past, None), r"2 of them"),
        (lambda past, future: (past, future[..., :-1]), r"\(.*\) torch.float32 on cpu and \(.*\) torch.float32 on cpu"),
        (lambda past, future: (past, future.double()), r"\(.*\) torch.float32 on cpu and \(.*\) torch.float64 on cpu"),
    ],
    ids=["one tensor", "one of two", "not a tensor", "another shape", "another dtype"],
)
def test_what_is_no_pair_is_refused_by_name(name, spoil, got):
    inputs = make_inputs("ssd", 5, left_out=("initial_state",))
    pairs = {key: (v, v) for key, v in inputs.items()}
    pairs[name] = spoil(*pairs[name])
    with pytest.raises(ValueError, match=rf"^{name}: expected .*past and future.*, got {got}"):
        ops.ssd_pair(**pairs)


@pytest.mark.parametrize("op", OPS)
def test_a_backend_takes_what_the_op_takes(op):
    expected = [name for name in inspect.signature(getattr(ops, op)).parameters if name != "backend"]
    for name, backend in OPS[op].items():
        function = backend.load(f"{op}_{name}")
        parameters = inspect.signature(function).parameters
        if "options" in parameters:  # by two scans, which take the rest
            parameters = {key: v for key, v in parameters.items() if key != "options"}
            assert list(parameters) == expected[: len(parameters)] and op in ("ssd_bidirectional", "ssd_pair")
        else:
            assert list(parameters) == expected or set(parameters) == set(expected), name


def test_a_backend_is_imported_when_it_is_first_chosen(tmp_path):
    """And nothing that only one of them needs before: triton, or what compiles C; nothing is compiled."""
    code = (
        "import sys, torch, cald_speech.ops as ops\n"
        "shared = ('cald_speech.ops.native', 'cald_speech.ops.triton')\n"
        "folders = tuple(f'cald_speech.ops.{op}.' for op in ('ssd', 'short_conv', 'selective_scan', 'gated_delta'))\n"
        "loaded = lambda: sorted(m for m in sys.modules if m.startswith(folders) or m in shared)\n"
        "print(loaded(), 'triton' in sys.modules)\n"
        "ops.short_conv(torch.ones(1, 3, 1), torch.ones(1, 2), backend='naive')\n"
        "print(loaded())\n"
    )
    environment = os.environ | {"CALD_SPEECH_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    before, after = done.stdout.splitlines()
    assert before == "[] False" and after == "['cald_speech.ops.short_conv.naive']"
    assert list(tmp_path.iterdir()) == []
