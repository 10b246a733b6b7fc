"""Parity oracle: what the published code computes, evaluated literally, against the presets of ours.

The reference (github.com/idiap/linearize-distill-pretrained-transformers) has one formula in speech/models/model.py,
one in lm/open_instruct/train_utils.py, one in nlp/run_glue_linformer.py. They are written here by their definition,
utterance by utterance and frame by frame, from the states that Hugging Face hands out.
"""

import math
from functools import partial

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import nn
from torch.nn import functional as F
from transformers import RobertaConfig, RobertaModel

from cald_speech.conversion import LayerMap, convert
from cald_speech.data.batching import Audio
from cald_speech.distillation import PRESETS
from cald_speech.families import family_of
from cald_speech.mixers import Bidirectional, Linformer
from cald_speech.training.schedules import WarmupSchedule
from tests.helpers import padded_batch, relative_error
from tests.training.one_step import IN_BATCHES, build, padded

ALPHA_LAYER, ALPHA_LOGITS, TEMPERATURE = 15.0, 1.0, 2.0


def observed(brain, batch):
    """What the reference's formulas see of a batch: states and logits of both models, losses, lengths."""
    inputs, frames = Audio().arguments(batch, brain.plain)
    student, teacher = (m(**inputs, output_hidden_states=True) for m in (brain.plain, brain.teacher))
    characters = (batch.labels.lengths * batch.labels.data.size(1)).round().long()
    log_probs = student.logits.float().log_softmax(-1).transpose(0, 1)
    losses = F.ctc_loss(log_probs, batch.labels.data, frames, characters, reduction="none", zero_infinity=True)
    return student, teacher, losses, characters, frames


def states_of(model, output):
    """hidden_states as transformers 4.44 gave them, which the reference was written for: the last after the norm."""
    return [*output.hidden_states[:-1], model.wav2vec2.encoder.layer_norm(output.hidden_states[-1])]


def normed(state):
    return (state - state.mean()) / (state.var(correction=0) + 1e-5).sqrt()


def divergence(teacher, student):
    p, q = (torch.softmax(logits / TEMPERATURE, 0) for logits in (teacher, student))
    return sum(p[i] * (p[i].log() - q[i].log()) for i in range(len(p)))


def speech(brain, batches):
    """Sums over frames, times the batch's characters over the step's frames, all divided by the step's characters."""
    seen = [observed(brain, batch) for batch in batches]
    all_frames = sum(int(frames.sum()) for *_, frames in seen)
    total, all_characters = 0.0, 0
    for student, teacher, losses, characters, frames in seen:
        finite = losses != 0
        own = int(characters[finite].sum())
        ours, theirs = states_of(brain.plain, student), states_of(brain.teacher, teacher)
        places = [(b, t) for b in range(len(frames)) if finite[b] for t in range(frames[b])]
        layers = [
            sum((normed(o[place]) - normed(t[place])).square().mean() for place in places)
            for o, t in zip(ours[1:], theirs[1:], strict=True)
        ]
        logits = sum(divergence(teacher.logits[place], student.logits[place]) for place in places)
        share = own / all_frames
        total = total + losses[finite].sum()
        total = total + share * (ALPHA_LAYER * sum(layers) / len(layers) + ALPHA_LOGITS * logits)
        all_characters += own
    return total / all_characters


def language_model(brain, batches):
    """Each batch's mean over all places, layers 1 to L - 1, divided by the number of accumulated batches."""
    total = 0.0
    for student, teacher, losses, characters, _ in (observed(brain, batch) for batch in batches):
        pairs = list(zip(student.hidden_states, teacher.hidden_states, strict=True))[1:-1]
        width = student.hidden_states[0].size(-1)
        layers = [F.mse_loss(F.layer_norm(s, (width,)), F.layer_norm(t, (width,))) for s, t in pairs]
        places = student.logits.flatten(0, 1), teacher.logits.flatten(0, 1)
        logits = sum(divergence(t, s) for s, t in zip(*places, strict=True)) / len(places[0])
        task = losses.sum() / characters.sum()
        total = total + (task + ALPHA_LAYER * sum(layers) / len(layers) + ALPHA_LOGITS * logits) / len(batches)
    return total


def understanding(brain, batches):
    """Raw squared distances of the embedding and every layer, summed; the divergence times T squared."""
    total = 0.0
    for student, teacher, losses, characters, _ in (observed(brain, batch) for batch in batches):
        pairs = zip(student.hidden_states, teacher.hidden_states, strict=True)
        layers = [F.mse_loss(s, t) for s, t in pairs]
        places = student.logits.flatten(0, 1), teacher.logits.flatten(0, 1)
        logits = sum(divergence(t, s) for s, t in zip(*places, strict=True)) / len(places[0]) * TEMPERATURE**2
        task = losses.sum() / characters.sum()
        total = total + (task + ALPHA_LAYER * sum(layers) + ALPHA_LOGITS * logits) / len(batches)
    return total


@pytest.fixture
def step(experiment):
    """A Brain before its first step, under a preset, and two unequal batches; one transcript is too long to be said."""

    def make(preset: str):
        keys = {"loss": preset, "normalisation": "reference", "alpha_layer": ALPHA_LAYER, "alpha_logits": ALPHA_LOGITS}
        # A random start: from the attention's weights the student would be too near the teacher to tell much.
        brain, dataset = build([str(experiment(initialise="random", **keys))])
        brain.plain.eval()
        batches = padded(dataset, IN_BATCHES)
        if preset == "speech":
            items = [dict(dataset[index]) for index in (0, 11, 3)]
            items[0]["labels"] = torch.tensor([5, 6]).repeat(100)
            batches[0] = PaddedBatch(items)
        return brain, batches

    return make


@pytest.mark.parametrize(
    ("preset", "literal"),
    [("speech", speech), ("lm", language_model), ("nlp", understanding)],
    ids=["speech", "lm", "nlp"],
)
def test_the_presets_are_the_references(step, preset, literal):
    brain, batches = step(preset)
    counts, weights = brain.objective.count(batches), brain.settings.guidance.weights(0)
    total = sum(brain.objective(brain.plain, batch, weights, counts).total for batch in batches)
    parameters = [p for p in brain.plain.parameters() if p.requires_grad]
    expected = literal(brain, batches)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, theirs = (torch.autograd.grad(t, parameters, allow_unused=True) for t in (total, expected))
    largest = max(g.abs().max() for g in theirs if g is not None)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None or not mine.any()) if other is None else (mine - other).abs().max() < 1e-4 * largest


class PublishedLinformer(nn.Module):
    """nlp/linformer_utils.py: keys and values of the valid places mixed, row by row; queries of all places."""

    def __init__(self, ours: Linformer):
        super().__init__()
        self.ours = ours

    def forward(self, hidden_states, attention_mask=None, **others):
        ours, lengths = self.ours, (attention_mask.expand(-1, 1, -1, -1)[:, 0, 0] > -1).sum(-1).tolist()
        q, k, v = (projection(hidden_states) for projection in (ours.q_proj, ours.k_proj, ours.v_proj))
        rows = []
        for row, n in enumerate(lengths):
            keys, values = (
                weights[:, :n] @ frames[row, :n] / math.sqrt(n)
                for weights, frames in ((ours.mix_keys, k), (ours.mix_values, v))
            )
            query, keys, values = (
                frames.unflatten(-1, (ours.num_heads, -1)).transpose(0, 1) for frames in (q[row], keys, values)
            )
            scores = query @ keys.mT / math.sqrt(query.size(-1))
            rows.append((scores.softmax(-1) @ values).transpose(0, 1).flatten(-2))
        return torch.stack(rows), None


def test_the_nlp_loss_is_the_published_one_at_padded_places_too():
    """From states of the published mixer in Hugging Face's model, and not from our own; a third is padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = RobertaConfig(**sizes, vocab_size=50, max_position_embeddings=20, attn_implementation="eager")
    teacher, student, published = (RobertaModel(config).eval() for _ in range(3))
    for model in (student, published):
        model.load_state_dict(teacher.state_dict())
    convert(student, LayerMap(partial(Linformer, k=5, max_length=16, fill_padding=True)))
    for layer, converted in zip(published.encoder.layer, student.encoder.layer, strict=True):
        mixer = family_of(student).mixer(converted)
        layer.attention.self, layer.attention.output.dense = PublishedLinformer(mixer), mixer.out_proj
    lengths = torch.tensor([9, 4, 5])
    mask = (torch.arange(9) < lengths[:, None]).long()
    inputs = {"input_ids": torch.randint(3, 50, (3, 9)).where(mask.bool(), 1), "attention_mask": mask}
    theirs, taught, ours = (m(**inputs, output_hidden_states=True).hidden_states for m in (published, teacher, student))
    literal = sum(F.mse_loss(s, t) for s, t in zip(theirs, taught, strict=True))
    form = PRESETS["nlp"]
    loss = form.layer_loss(form.distances(ours, taught, None) / mask.numel())
    assert loss.item() == pytest.approx(literal.item(), rel=1e-5)
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-5


def test_the_papers_weight_acts_as_its_share_of_the_accumulated_batches(experiment):
    """With equal batches the distances come out divided by their number: 15 acts as 3.75 in TED-LIUM's four."""
    found = {}
    for normalisation in ("reference", "per_frame"):
        brain, dataset = build([str(experiment(initialise="random", normalisation=normalisation))])
        brain.plain.eval()
        batches = padded(dataset, [[7]] * 4)
        counts, weights = brain.objective.count(batches), brain.settings.guidance.weights(0)
        losses = [brain.objective(brain.plain, batch, weights, counts) for batch in batches]
        found[normalisation] = [sum(getattr(loss, name) for loss in losses) for name in ("task", "layers", "logits")]
    for term, (reference, ours) in enumerate(zip(*found.values(), strict=True)):
        assert torch.allclose(reference * (4 if term else 1), ours, rtol=1e-5)


def test_the_schedule_is_the_references_but_for_its_first_step():
    """Theirs warms up from 0, so that the first step does nothing; ours is one step ahead until it is at the top."""
    warmup, decay, final = 50, 750, 0.005

    def literal(step):
        if step < warmup:
            return step / warmup
        return math.exp(math.log(final) / decay * (step - warmup)) if step < warmup + decay else final

    ours = WarmupSchedule(warmup, decay, "exponential", floor=final)
    assert [ours(step) for step in range(warmup)] == pytest.approx([literal(step + 1) for step in range(warmup)])
    steps = range(warmup, warmup + decay + 50)
    assert [ours(step) for step in steps] == pytest.approx([literal(step) for step in steps])


def test_time_is_reversed_within_the_valid_frames():
    torch.manual_seed(0)
    mixer = Bidirectional(16, 2, d_state=8, n_groups=1)
    x, lengths = padded_batch((9, 4), 16)
    y = mixer(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        valid = x[row : row + 1, :length]
        backwards = torch.stack([valid[:, length - 1 - t] for t in range(length)], dim=1)
        past, future = mixer.forwards(valid), mixer.backwards(backwards)
        literal = torch.stack([past[0, t] + future[0, length - 1 - t] for t in range(length)])
        assert relative_error(y[row, :length], literal) < 1e-5 and not y[row, length:].any()
