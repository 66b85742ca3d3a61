"""Step similarity and colours: hand-built layers that do not move, and plain twins of formulas."""

import numpy as np
import pytest
import torch

from scd.data.clip import Conditions
from scd.models.config import LayerSkip, SamplingConfig
from scd.models.flow import draw_times, solve
from scd.probing.measurements.colours import agreement, coloured, feature_pca, principal
from scd.probing.measurements.similarity import alignment, centred, step_similarity, token_cosine
from scd.probing.models import subject_of
from scd.probing.subject import Task
from scd.probing.trajectory import (
    Features,
    denoise,
    feature_bytes,
    layer_features,
    noise_levels,
    spread,
    spread_early,
    step_times,
)
from tests.probing.test_probe_subject import task_for
from tests.third_party import TheirBlock, third_party
from tests.tiny import tiny_dense, tiny_separable

STEPS = SamplingConfig(num_steps=5)


def their_task(num_clips=3, num_frames=4, num_noises=1):
    clean = torch.randn(num_clips, num_frames, 2, 4, 6, generator=torch.Generator().manual_seed(1))
    return Task.of(clean, Conditions(), num_noises=num_noises)


def random_tokens(steps=4, clips=2, tokens=5, width=6, seed=0):
    return torch.randn(steps, clips, tokens, width, generator=torch.Generator().manual_seed(seed))


def test_frozen_layers_are_the_same_at_all_steps_and_others_are_not():
    """Layers 1 and 2 know the past only: similarity 1 plain and centred; 3 and 4 see the noise."""
    subject = third_party([TheirBlock] * 4, enters_before=2)
    found = step_similarity(layer_features(subject, their_task(), STEPS))
    assert found.layers == (1, 2, 3, 4) and found.cosine.shape == (4, 5, 5)
    for name in ("cosine", "flattened", "centred", "centred_by_step", "cka"):
        matrices = getattr(found, name)
        np.testing.assert_allclose(matrices[:2], 1, atol=1e-5, err_msg=name)
        assert (matrices[2:, 0, -1] < 0.99).all(), name
        np.testing.assert_allclose(np.diagonal(matrices, axis1=1, axis2=2), 1, atol=1e-5)


def test_centring_takes_away_the_common_vector():
    tokens = random_tokens()
    inflated = tokens + 1000
    assert token_cosine(inflated)[0, 1] > 0.999
    torch.testing.assert_close(
        token_cosine(centred(inflated)), token_cosine(centred(tokens)), atol=1e-3, rtol=0
    )
    assert abs(token_cosine(centred(inflated))[0, 1]) < 0.5


def test_what_all_tokens_gain_in_common_over_the_steps_is_no_change_by_step():
    tokens = random_tokens(steps=1).repeat(4, 1, 1, 1) + 20 * random_tokens(4, 1, 1, seed=1)
    found = step_similarity([Features(layer=0, tokens=tokens)])
    np.testing.assert_allclose(found.centred_by_step, 1, atol=1e-5)
    assert found.centred[0, 0, -1] < 0.9 and found.cosine[0, 0, -1] < 0.9


def test_cosines_are_those_of_the_formula():
    tokens = random_tokens()
    found = step_similarity([Features(layer=3, tokens=tokens)])
    assert found.layers == (4,)
    cosine = torch.nn.functional.cosine_similarity
    mean = tokens.mean((0, 1, 2))
    for one in range(4):
        for other in range(4):
            a, b = tokens[one], tokens[other]
            pairs = {
                "cosine": cosine(a, b, dim=-1),
                "flattened": cosine(a.flatten(1), b.flatten(1), dim=-1),
                "centred": cosine(a - mean, b - mean, dim=-1),
                "centred_by_step": cosine(a - a.mean((0, 1)), b - b.mean((0, 1)), dim=-1),
            }
            for name, expected in pairs.items():
                assert getattr(found, name)[0, one, other] == pytest.approx(
                    float(expected.mean()), abs=1e-5
                )


def test_alignment_is_that_of_gram_matrices_and_forgets_rotations():
    tokens = random_tokens(tokens=8)
    turn = torch.linalg.qr(random_tokens(1, 1, 6)[0, 0])[0]
    tokens[3] = 7 * tokens[0] @ turn + 2
    found = alignment(tokens)
    centre = torch.eye(16) - 1 / 16
    grams = [centre @ (x @ x.T) @ centre for x in tokens.flatten(1, 2)]
    for one in range(4):
        for other in range(4):
            a, b = grams[one], grams[other]
            assert found[one, other] == pytest.approx(
                float((a * b).sum() / (a.norm() * b.norm())), abs=1e-5
            )
    assert found[0, 3] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("build", [tiny_dense, tiny_separable])
def test_features_are_what_the_layers_gave(build):
    """In several passes as in one; the trajectory is the one that sampling takes."""
    subject = subject_of(build())
    task = task_for(subject.model)
    whole = list(layer_features(subject, task, STEPS))
    assert [one.layer for one in whole] == subject.stepped
    one_layer = feature_bytes(subject, 2, 5)
    assert whole[0].tokens.numel() * 4 == one_layer
    for one, again in zip(
        whole, layer_features(subject, task, STEPS, max_bytes=one_layer), strict=True
    ):
        assert one.layer == again.layer and torch.equal(one.tokens, again.tokens)
    state, times = task.begin(subject), step_times(STEPS)
    given = []
    hook = subject.layers[-1].block.register_forward_hook(lambda *call: given.append(call[2]))
    *_, frame = denoise(subject, state, task.noise, times)
    hook.remove()
    torch.testing.assert_close(
        torch.stack(given)[:, :, 0, -6:], whole[-1].tokens, atol=1e-6, rtol=0
    )
    with torch.no_grad():
        expected = solve(lambda x, time: subject.velocity(state, x, time), task.noise, times)
    torch.testing.assert_close(frame, expected, atol=1e-5, rtol=1e-4)


def test_what_has_no_steps_is_refused():
    separable = subject_of(tiny_separable())
    task = task_for(separable.model)
    with pytest.raises(ValueError, match="2 or more, got 1"):
        next(layer_features(separable, task, SamplingConfig(num_steps=1)))
    with pytest.raises(ValueError, match="solver='heun'"):
        step_times(SamplingConfig(num_steps=4, solver="heun"))
    with pytest.raises(ValueError, match="encoder 1 runs once per frame"):
        next(layer_features(separable, task, STEPS, [1]))
    with pytest.raises(ValueError, match=r"1 \.\. 4, got \[5\]"):
        next(layer_features(separable, task, STEPS, [5]))
    with pytest.raises(ValueError, match="got none"):
        step_similarity([])
    skipping = tiny_dense(skip=LayerSkip(first=1, stop=2, below=0.5))
    with pytest.raises(ValueError, match="this model skips some"):
        subject_of(skipping)


def test_noise_levels_are_quantiles_of_the_times_of_training():
    times = draw_times([200_000], torch.Generator().manual_seed(0), 0.7, 1.3)
    expected = torch.quantile(times, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    torch.testing.assert_close(torch.tensor(noise_levels(0.7, 1.3)), expected, atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        noise_levels(quantiles=[0.0])


def test_spreads_reach_both_ends():
    assert spread(1, 12, 6) == [1, 3, 5, 8, 10, 12] and spread(2, 3, 6) == [2, 3]
    assert spread_early(40, 5) == [1, 3, 6, 16, 40] and spread_early(1, 5) == [1]


def test_components_are_those_of_the_singular_values():
    tokens = random_tokens(clips=3)
    components, share = principal(tokens)
    for clip in range(3):
        flat = tokens[:, clip].flatten(0, 1)
        flat = flat - flat.mean(0)
        u, s, _ = torch.linalg.svd(flat, full_matrices=False)
        expected = (u * s)[:, :3].abs()
        found = components[clip].flatten(0, 1).abs()
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(share[clip], (s**2 / (s**2).sum())[:3], atol=1e-5, rtol=1e-4)


def test_colours_share_one_scale_and_agreement_is_correlation():
    tokens = random_tokens(steps=4, tokens=6)
    tokens[2] = tokens[3]
    components, _ = principal(tokens)
    colours = coloured(components)
    assert colours.min() == 0 and colours.max() == 1
    assert torch.equal(colours[:, 2], colours[:, 3])
    found = agreement(components)
    torch.testing.assert_close(found[:, 2:], torch.ones(2, 2, 3))
    pair = torch.stack([components[1, 0, :, 2], components[1, 3, :, 2]])
    assert found[1, 0, 2] == pytest.approx(abs(float(torch.corrcoef(pair)[0, 1])), abs=1e-5)


def test_frozen_features_have_the_colours_of_the_last_step_from_the_first_on():
    subject = third_party([TheirBlock] * 3, enters_before=2)
    view = feature_pca(layer_features(subject, their_task(), STEPS), subject.grid, 2, 3)
    assert view.pictures.shape == (3, 2, 3, 2, 3, 3) and view.steps == (1, 3, 5)
    assert view.layers == (1, 2, 3)
    np.testing.assert_allclose(view.agreement[:2], 1, atol=1e-4)
    np.testing.assert_array_equal(view.pictures[:2, :, 0], view.pictures[:2, :, 2])
    assert (view.agreement[2, 0] < 0.99).any()
    assert (view.explained.sum(-1) <= 1 + 1e-5).all()
    with pytest.raises(ValueError, match="width 3 or more, got 2"):
        principal(random_tokens(width=2))
