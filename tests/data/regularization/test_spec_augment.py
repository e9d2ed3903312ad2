import zlib

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification, WhisperForAudioClassification

from hf_accel import SpecAugment
from hf_accel.batch import MicroBatch, StepBatch, StepPlan
from hf_accel.data.regularization.spec_augment import draw_stretches
from hf_accel.testing import tiny_llama, tiny_trainer, tiny_whisper


class Host:
    class clock:
        progress = 1.0


def started(model=None, **fields):
    technique = SpecAugment(**fields)
    technique.run_ = Host()
    technique.on_train_begin(None, None, None, model=model or tiny_whisper())
    return technique


def masked(technique, inputs, ids):
    batch = StepBatch(StepPlan(2, torch.tensor(ids), None, 8, seed=3), [MicroBatch(inputs, torch.tensor(ids), None)])
    return technique.transform_batch(batch).micro_batches[0].inputs


def test_stretches_are_the_papers():
    """Widths uniform from 0 to the largest, begins uniform over what is left."""
    generator = np.random.default_rng(0)
    found = [s for _ in range(2000) for s in draw_stretches(generator, 2, 50, 0.2)]
    widths = np.array([s.stop - s.start for s in found])
    assert len(found) == 4000 and set(widths) == set(range(11))
    assert all(0 <= s.start and s.stop <= 50 for s in found)
    assert widths.mean() == pytest.approx(5, abs=4 * 10**0.5 / 4000**0.5)
    begins = np.array([s.start / (50 - (s.stop - s.start)) for s in found])
    assert begins.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / 4000) ** 0.5 + 0.01)


@pytest.mark.parametrize("frames_first", [False, True])
def test_masks_are_a_loop(frames_first):
    """Both layouts, the length of an example from its mask, the blank from its own mean."""
    features = torch.rand(3, 8, 40, dtype=torch.float64)
    lengths = [40, 25, 10]
    mask = torch.tensor([[1] * n + [0] * (40 - n) for n in lengths])
    given = features.transpose(1, 2).contiguous() if frames_first else features
    inputs = masked(
        started(frequency_masks=1, frequency_width=0.5, time_masks=2, time_width=0.3),
        {"input_features": given, "attention_mask": mask},
        [5, 6, 9],
    )
    found = inputs["input_features"].transpose(1, 2) if frames_first else inputs["input_features"]
    for i, example in enumerate([5, 6, 9]):
        generator = np.random.default_rng((3, 2, example, zlib.crc32(b"SpecAugment")))
        expected, n = features[i].clone(), lengths[i]
        mean = float(features[i, :, :n].mean())
        (bands,) = draw_stretches(generator, 1, 8, 0.5)
        for band in range(8):
            for t in range(n):
                if bands.start <= band < bands.stop:
                    expected[band, t] = mean
        for stretch in draw_stretches(generator, 2, n, 0.3):
            for t in range(stretch.start, stretch.stop):
                expected[:, t] = mean
        assert torch.allclose(found[i], expected, rtol=1e-12)
    assert given is not inputs["input_features"]


def test_widths_rise_with_progress():
    technique = started(ramp=0.5)
    technique.run_.clock.progress = 0.0
    features = torch.rand(2, 8, 40)
    assert torch.equal(masked(technique, {"input_features": features}, [0, 1])["input_features"], features)
    assert not technique.took_effect(technique.report())
    technique.run_.clock.progress = 1.0
    masked(technique, {"input_features": features}, [0, 1])
    assert 0 < technique.report()["blank"] < 0.7


def test_other_models_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"SpecAugment\(.*LlamaForCausalLM because it reads no spectrograms. Remove SpecAugment"
    ):
        tiny_trainer([SpecAugment()], tmp_path, modality="text").train()
    wave = Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,),
        conv_stride=(4,), conv_kernel=(4,), num_feat_extract_layers=1, num_conv_pos_embeddings=2,
        num_conv_pos_embedding_groups=2, classifier_proj_size=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="reads no spectrograms. Set config.mask_time_prob"):
        started(Wav2Vec2ForSequenceClassification(wave))
    config = tiny_whisper().config
    config.apply_spec_augment = True
    with pytest.raises(ValueError, match="Set config.apply_spec_augment=False"):
        started(WhisperForAudioClassification(config))
    with pytest.raises(ValueError, match="needs spectrograms of 8 bands"):
        masked(started(), {"input_features": torch.rand(2, 7, 40)}, [0, 1])
    assert not hasattr(tiny_llama().config, "num_mel_bins")
