"""The losses are sums over valid frames, with counts: batches add up, and padding never matters."""

import pytest
import torch
from torch.nn import functional as F

from cald_speech.distillation import LossForm, layer_distances, logit_loss, reduce_layers
from tests.helpers import TOLERANCE, padded_batch, relative_error

LENGTHS = (9, 4, 7)
NUM_LAYERS, WIDTH, LABELS = 3, 16, 11
both_normalisations = pytest.mark.parametrize("normalise", ["none", "layer_norm"])


def states(seed: int, lengths=LENGTHS):
    """(L states (B, T, D), lengths), with noise at the padding."""
    layers = [padded_batch(lengths, WIDTH, seed=10 * seed + layer)[0] for layer in range(NUM_LAYERS)]
    return layers, torch.tensor(lengths)


def logits(seed: int, lengths=LENGTHS):
    return padded_batch(lengths, LABELS, seed=seed)[0], torch.tensor(lengths)


def close(actual, expected, tolerance="rounding"):
    return relative_error(actual, torch.as_tensor(expected)) < TOLERANCE[tolerance]


# --- hidden states ----------------------------------------------------------------------------------------------------


@both_normalisations
def test_identical_states_are_no_distance(normalise):
    student, lengths = states(0)
    sums, frames = layer_distances(student, [s.clone() for s in student], lengths, normalise=normalise)
    assert torch.equal(sums, torch.zeros(NUM_LAYERS)) and frames == sum(LENGTHS)


def test_raw_distance_by_hand():
    (student, lengths), (teacher, _) = states(0), states(1)
    sums, _ = layer_distances(student, teacher, lengths)
    for layer in range(NUM_LAYERS):
        by_hand = sum(
            F.mse_loss(student[layer][b, t], teacher[layer][b, t])
            for b, length in enumerate(LENGTHS)
            for t in range(length)
        )
        assert close(sums[layer], by_hand)


def test_cosine_distance_by_hand():
    (student, lengths), (teacher, _) = states(0), states(1)
    sums, _ = layer_distances(student, [3 * t for t in teacher], lengths, distance="cosine")
    for layer in range(NUM_LAYERS):
        pairs = [(student[layer][b, t], teacher[layer][b, t]) for b, n in enumerate(LENGTHS) for t in range(n)]
        by_hand = sum(1 - (s @ t) / (s.norm() * t.norm()) for s, t in pairs)
        assert close(sums[layer], by_hand)


def test_cosine_distance_has_no_gradient_at_padding():
    (student, lengths), (teacher, _) = states(0), states(1)
    student = [s.requires_grad_() for s in student]
    sums, _ = layer_distances(student, teacher, lengths, distance="cosine")
    for gradient in torch.autograd.grad(sums.sum(), student):
        assert gradient.isfinite().all() and not gradient[1, LENGTHS[1] :].any()


def test_an_unknown_distance_is_named():
    with pytest.raises(ValueError, match="distance: expected one of squared, cosine, got 'city block'"):
        layer_distances(*(2 * [states(0)[0]]), distance="city block")


@both_normalisations
def test_padding_never_counts(normalise):
    (student, lengths), (teacher, _) = states(0), states(1)
    expected, _ = layer_distances(student, teacher, lengths, normalise=normalise)
    for state in (*student, *teacher):
        state[1, LENGTHS[1] :] *= 1e6
    student = [s.requires_grad_() for s in student]
    sums, _ = layer_distances(student, teacher, lengths, normalise=normalise)
    assert torch.equal(sums, expected)
    for gradient in torch.autograd.grad(sums.sum(), student):
        assert not gradient[1, LENGTHS[1] :].any() and gradient[1, : LENGTHS[1]].any(-1).all()


@both_normalisations
def test_batches_add_up(normalise):
    (student, lengths), (teacher, _) = states(0), states(1)
    joined, frames = layer_distances(student, teacher, lengths, normalise=normalise)
    parts = []
    for rows in ([0, 2], [1]):
        longest = int(lengths[rows].max())
        part = [[s[rows, :longest] for s in side] for side in (student, teacher)]
        parts.append(layer_distances(*part, lengths[rows], normalise=normalise))
    assert close(sum(sums for sums, _ in parts), joined)
    assert sum(count for _, count in parts) == frames


def test_layer_norm_sees_no_scale_and_no_shift():
    (student, lengths), (teacher, _) = states(0), states(1)
    expected, _ = layer_distances(student, teacher, lengths, normalise="layer_norm")
    student = [7 * s + 3 for s in student]
    scaled, _ = layer_distances(student, [0.5 * t for t in teacher], lengths, normalise="layer_norm")
    assert relative_error(scaled, expected) < 1e-3  # the norm's epsilon is seen a little
    raw, _ = layer_distances(student, teacher, lengths)
    assert (raw > 10 * expected).all()


def test_weights_and_reduction():
    distances = torch.tensor([1.0, 2.0, 6.0])
    assert reduce_layers(distances) == 3 and reduce_layers(distances, reduce="sum") == 9
    weights = [0.0, 1.0, 3.0]
    assert reduce_layers(distances, weights) == 5 and reduce_layers(distances, weights, "sum") == 20


def test_a_form_passes_its_options_on():
    (student, lengths), (teacher, _) = states(0), states(1)
    form = LossForm(layer_distance="cosine", layer_normalise="none", layer_weights=[1, 0, 1], layer_reduce="sum")
    distances = layer_distances(student, teacher, lengths, distance="cosine")[0]
    assert torch.equal(form.distances(student, teacher, lengths), distances)
    assert torch.equal(form.layer_loss(distances), distances[0] + distances[2])
    (ours, lengths), (theirs, _) = logits(0), logits(1)
    form = LossForm(temperature=3.0, scale_by_t2=True, blank_weight=0.5)
    expected = logit_loss(ours, theirs, lengths, temperature=3.0, scale_by_t2=True, blank=1, blank_weight=0.5)[0]
    assert torch.equal(form.logit_loss(ours, theirs, lengths, blank=1), expected)


def test_no_lengths_means_all_frames():
    (student, _), (teacher, _) = states(0), states(1)
    whole = torch.full((3,), max(LENGTHS))
    assert torch.equal(layer_distances(student, teacher)[0], layer_distances(student, teacher, whole)[0])
    assert layer_distances(student, teacher)[1] == 3 * max(LENGTHS)
    assert torch.equal(logit_loss(*student[:2])[0], logit_loss(*student[:2], whole)[0])


@pytest.mark.parametrize("loss", [layer_distances, logit_loss])
def test_the_teacher_gets_no_gradient(loss):
    make = states if loss is layer_distances else logits
    (student, lengths), (teacher, _) = make(0), make(1)
    for side in (student, teacher):
        for tensor in side if isinstance(side, list) else [side]:
            tensor.requires_grad_()
    loss(student, teacher, lengths)[0].sum().backward()
    first, other = (side[0] if isinstance(side, list) else side for side in (student, teacher))
    assert first.grad.abs().sum() > 0 and other.grad is None


@pytest.mark.parametrize("loss", [layer_distances, logit_loss])
def test_bfloat16_is_computed_in_float32(loss):
    make = states if loss is layer_distances else logits
    (student, lengths), (teacher, _) = make(0), make(1)

    def cast(side, dtype):
        return [s.bfloat16().to(dtype) for s in side] if isinstance(side, list) else side.bfloat16().to(dtype)

    half, count = loss(cast(student, torch.bfloat16), cast(teacher, torch.bfloat16), lengths)
    full, _ = loss(cast(student, torch.float32), cast(teacher, torch.float32), lengths)
    assert half.dtype == count.dtype == torch.float32 and torch.equal(half, full)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: layer_distances(s, t, normalise="batch"), "expected one of none, layer_norm, got 'batch'"),
        (lambda s, t: layer_distances(s, t[:2]), "expected the same hidden states"),
        (lambda s, t: layer_distances(s, [x[:, 1:] for x in t]), "expected the same hidden states"),
        (lambda s, t: reduce_layers(torch.ones(3), [1.0]), "weights: expected 3, one for each layer, got 1"),
        (lambda s, t: reduce_layers(torch.ones(3), reduce="max"), "expected mean or sum, got 'max'"),
    ],
    ids=["normalisation", "number of layers", "shape", "number of weights", "reduction"],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(states(0)[0], states(1)[0])


# --- logits -----------------------------------------------------------------------------------------------------------


def by_hand(student, teacher, lengths, temperature):
    """(B, T) divergences by torch's own function, on one utterance at a time."""
    return [
        F.kl_div(
            F.log_softmax(student[b, :length] / temperature, -1),
            F.softmax(teacher[b, :length] / temperature, -1),
            reduction="none",
        ).sum(-1)
        for b, length in enumerate(lengths.tolist())
    ]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale_by_t2", [False, True], ids=["plain", "times T^2"])
def test_divergence_by_hand(temperature, scale_by_t2):
    (student, lengths), (teacher, _) = logits(0), logits(1)
    total, frames = logit_loss(student, teacher, lengths, temperature=temperature, scale_by_t2=scale_by_t2)
    expected = torch.cat(by_hand(student, teacher, lengths, temperature)).sum()
    assert close(total, expected * (temperature**2 if scale_by_t2 else 1)) and frames == sum(LENGTHS)


def test_identical_logits_are_no_divergence():
    student, lengths = logits(0)
    assert logit_loss(student, student + 5.0, lengths)[0].abs() < 1e-4


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_blank_frames_weigh_less(weight):
    (student, lengths), (teacher, _) = logits(0), logits(1)
    teacher[:, ::2, 0] += 20.0
    total, frames = logit_loss(student, teacher, lengths, blank=0, blank_weight=weight)
    expected = sum(
        (row * torch.where(teacher[b, : len(row)].argmax(-1) == 0, weight, 1.0)).sum()
        for b, row in enumerate(by_hand(student, teacher, lengths, 2.0))
    )
    assert close(total, expected) and frames == sum(LENGTHS)


def test_logits_at_the_padding_never_count():
    (student, lengths), (teacher, _) = logits(0), logits(1)
    expected = logit_loss(student, teacher, lengths)[0]
    for side in (student, teacher):
        side[1, LENGTHS[1] :] *= 1e6
    total = logit_loss(student.requires_grad_(), teacher, lengths)[0]
    assert torch.equal(total, expected)
    (gradient,) = torch.autograd.grad(total, student)
    assert not gradient[1, LENGTHS[1] :].any() and gradient[1, : LENGTHS[1]].any(-1).all()


def test_logit_batches_add_up():
    (student, lengths), (teacher, _) = logits(0), logits(1)
    parts = [logit_loss(student[r], teacher[r], lengths[r]) for r in ([0], [1, 2])]
    joined = logit_loss(student, teacher, lengths)
    assert close(sum(total for total, _ in parts), joined[0])
    assert sum(frames for _, frames in parts) == joined[1]


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_garbage_at_padding_reaches_neither_loss_nor_gradient(garbage):
    lengths = torch.tensor([5, 2])
    clean, other = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    for loss in (
        lambda s, t: layer_distances([s], [t], lengths, normalise="layer_norm")[0].sum(),
        lambda s, t: logit_loss(s, t, lengths)[0],
    ):
        outcomes = []
        for value in (0.0, garbage):
            student, teacher = clean.clone(), other.clone()
            student[1, 2:] = teacher[1, 2:] = value
            student.requires_grad_()
            loss(student, teacher).backward()
            outcomes.append((loss(student, teacher).detach(), student.grad))
        assert torch.equal(outcomes[0][0], outcomes[1][0])
        assert torch.equal(outcomes[0][1], outcomes[1][1]) and not outcomes[1][1][1, 2:].any()
