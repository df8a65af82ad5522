"""A lens result as a table, and in one line."""

import pytest
import torch

from tests.models import tiny_model, tiny_tokens
from tl_loops.lens import logit_lens

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model("huginn", initializer_range=0.15)


def test_one_row_per_point_and_real_token(model):
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    result = logit_lens(model, tiny_tokens(), attention_mask=mask, track={"five": 5}, top_k=3)
    frame = result.to_frame()
    assert len(frame) == len(result.points) * 15
    for p, point in enumerate(result.points):
        for prompt, position in ((0, 3), (1, 0), (1, 8)):
            (row,) = frame[
                (frame.name == point.name) & (frame.prompt == prompt) & (frame.position == position)
            ].to_dict("records")
            at = (p, prompt, position)
            assert row["prediction_id"] == result.predictions[at]
            assert row["probability"] == pytest.approx(float(result.top_probabilities[at][0]))
            assert row["entropy"] == pytest.approx(float(result.entropy[at]))
            assert row["kl_to_final"] == pytest.approx(float(result.kl_to_final[at]))
            assert row["agrees"] == bool(result.agreement()[at])
            assert row["top"] == tuple(str(int(token)) for token in result.top_tokens[at])
            assert row["rank five"] == result.tracked["five"].rank[at]
            assert row["token"] == str(int(result.tokens[prompt, position]))
    core = frame[frame.phase == "core"]
    assert set(core.iteration) == {0, 1, 2} and set(core.layer) == {0, 1}
    assert frame[frame.phase == "prelude"].iteration.isna().all()
