"""TokenFlow's model against its authors' own numbers, and cached decoding against a plain double without a cache."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from random_weights import sharpen
from tokenflow_source import golden
from transformers_nextflow import NextFlowForCausalLM, TokenFlowConfig, TokenFlowForCausalLM, TokenFlowProcessor
from transformers_nextflow.image_processing_pil_nextflow import to_pil
from transformers_nextflow.kept_regions import kept_places
from transformers_nextflow.modeling_nextflow import scale_feature_maps
from transformers_nextflow.token_layout import TokenLayout

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from plain_tokenflow import plain_codes, plain_embeds

PAD, TEXT = 32, 33
GRID = [4, 16, 16]
GUIDED = dict(guidance_scale=8.5, guidance_schedule="linear", return_dict_in_generate=True)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return golden()


@pytest.fixture(scope="module")
def model(tiny_tokenflow_checkpoint) -> TokenFlowForCausalLM:
    return TokenFlowForCausalLM.from_pretrained(tiny_tokenflow_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(tensors) -> dict[str, torch.Tensor]:
    """Two prompts of unequal length and TokenFlow's negative one, as the model takes them."""
    ids = torch.stack([tensors["gen1.prefix0"], tensors["gen1.prefix1"]])
    negative = tensors["gen1.prefix2"][None]
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "negative_prompt_ids": negative,
        "negative_prompt_attention_mask": (negative != PAD).long(),
    }


class TestOriginal:
    """Numbers that TokenFlow's own code computed, on the weights that our converter read."""

    @pytest.fixture
    def batch(self, tensors) -> dict[str, torch.Tensor]:
        ids = tensors["tf.input_ids"]
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "image_grid_shw": torch.tensor([GRID] * 2)}

    @torch.no_grad()
    def test_input_slots(self, model, tensors, batch):
        layout = TokenLayout.of(batch["input_ids"], batch["image_grid_shw"], model.config, batch["attention_mask"])
        embeds = model.model._embed(batch["input_ids"], None, layout)
        torch.testing.assert_close(embeds, tensors["tf.inputs_embeds"], atol=1e-5, rtol=0)
        # The original counts its padding, here positions begin with the text: all distances are the same.
        real = batch["attention_mask"].bool()
        shift = tensors["tf.position_ids"] - layout.position_ids
        assert all(len(row[mask].unique()) == 1 for rows in shift for row, mask in zip(rows, real, strict=True))

    @torch.no_grad()
    def test_logits_and_loss(self, model, tensors, batch):
        output = model(**batch, labels=tensors["tf.labels"])
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(output.logits[real], tensors["tf.logits"][real], atol=1e-5, rtol=0)
        torch.testing.assert_close(output.loss, tensors["tf.loss_vision"], atol=1e-5, rtol=0)

    def test_a_scale_that_is_fed_itself(self, tensors):
        config = TokenFlowConfig(scale_sides=[1, 2, 3, 4])
        vectors = tensors["feat.codebook"][tensors["feat.codes"]]
        maps = scale_feature_maps(vectors, config.schedule(), range(3, 4), accumulated=True, own_map=True)
        torch.testing.assert_close(maps, tensors["feat.pred_for_curr_shape2"][:, -16:], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("num_passes", [1, 2, 3])
    @pytest.mark.parametrize("cache", ["preallocated", "dynamic", "static"])
    def test_greedy_generation(self, model, tensors, prompts, num_passes, cache):
        settings = dict(GUIDED, do_sample=False, num_passes=num_passes, cache_implementation=cache)
        output = model.generate(**prompts, **settings)
        assert torch.equal(output.image_codes, tensors[f"gen{num_passes}.codes"])
        # Each prompt alone, without padding.
        for row in range(2):
            ids = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
            negative = {name: value for name, value in prompts.items() if name.startswith("negative")}
            alone = model.generate(ids[None], **negative, **settings)
            assert torch.equal(alone.image_codes[0], output.image_codes[row])

    @pytest.mark.parametrize("num_passes", [1, 2, 3])
    def test_greedy_generation_without_a_cache(self, model, tensors, prompts, num_passes):
        negative = prompts["negative_prompt_ids"][0][3:]
        for row in range(2):
            ids = prompts["input_ids"][row][prompts["attention_mask"][row].bool()]
            codes, _ = plain_codes(model, ids, negative, 7.5, num_passes)
            assert torch.equal(codes, tensors[f"gen{num_passes}.codes"][row])

    def test_what_the_plain_double_feeds(self, model, tensors, prompts):
        """The second of three passes over the last scale: earlier scales carry what they carried in their first."""
        embeds = plain_embeds(model, prompts["input_ids"][0], tensors["gen3.codes"][0][:14], 3, own_map=False)
        expected = tensors["gen3.step8.inputs_embeds"][0]
        torch.testing.assert_close(embeds[:22], expected[:22], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("num_passes", [1, 2, 3])
    def test_pictures(self, tiny_tokenflow_checkpoint, tensors, num_passes):
        images = TokenFlowProcessor.from_pretrained(tiny_tokenflow_checkpoint, dtype=torch.float32).image_tokenizer
        pixels = images.decode(tensors[f"gen{num_passes}.codes"], torch.tensor([GRID]))
        torch.testing.assert_close(pixels, tensors[f"gen{num_passes}.image"].clamp(-1, 1), atol=1e-4, rtol=0)
        # The same levels of the same pixels, and of ours where the tolerance can't move them over a whole number.
        expected = tensors[f"gen{num_passes}.image_uint8"]
        assert np.array_equal(np.stack(to_pil(tensors[f"gen{num_passes}.image"])), expected)
        levels = (127.5 * pixels + 128).clamp(0, 255).permute(0, 2, 3, 1)
        found = torch.from_numpy(np.stack(to_pil(pixels)))
        sure = (levels - levels.round()).abs() > 127.5e-4
        assert torch.equal(found[sure], expected[sure])
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


@pytest.fixture(scope="module")
def random_model() -> TokenFlowForCausalLM:
    torch.manual_seed(0)
    config = TokenFlowConfig(
        vocab_size=40 + 50,
        text_vocab_size=40,
        visual_codebook_size=50,
        visual_code_dim=6,
        scale_sides=[1, 2, 4, 7],
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        image_start_ids=[5, 6],
        image_end_ids=[9],
        pad_token_id=39,
    )
    model = TokenFlowForCausalLM(config).eval()
    sharpen(model)
    return model


@pytest.mark.parametrize("num_passes", [1, 3, 5])
def test_cached_decoding_is_the_plain_one(random_model, num_passes):
    texts = [[11, 12, 13, 14, 15, 5, 6], [11, 5, 6]]
    ids = torch.tensor([texts[0], [39] * 4 + texts[1]])
    negative = torch.tensor([20, 21, 22, 5, 6])
    settings = dict(GUIDED, do_sample=False, num_passes=num_passes, negative_prompt_ids=negative[None])
    output = random_model.generate(ids, attention_mask=(ids != 39).long(), **settings)
    for text, codes in zip(texts, output.image_codes, strict=True):
        expected, _ = plain_codes(random_model, torch.tensor(text), negative, 7.5, num_passes)
        assert torch.equal(codes, expected)


def test_sampling_does_not_depend_on_the_batch(random_model):
    texts = torch.tensor([[11, 12, 5, 6], [13, 14, 5, 6]])
    candidates = [[[20, 0.9]], [[30, 0.9], [10, 0.8]], [[30, 0.9], [10, 0.8], [1, 1.0]]]
    for num_passes in (1, 2, 3):
        settings = dict(GUIDED, num_passes=num_passes, pass_candidates=candidates, negative_ids=[20])
        both = random_model.generate(texts, generator=[torch.Generator().manual_seed(s) for s in (3, 4)], **settings)
        alone = random_model.generate(texts[1:], generator=torch.Generator().manual_seed(4), **settings)
        assert torch.equal(both.image_codes[1:], alone.image_codes)
        other = random_model.generate(texts[1:], generator=torch.Generator().manual_seed(5), **settings)
        assert not torch.equal(other.image_codes, alone.image_codes)


def test_passes_without_stored_candidates(random_model):
    """However many, those after the first take the likeliest codes."""
    candidates = [[[30, 0.9], *[[1, 1.0]] * later] for later in range(4)]
    drawn = [
        random_model.generate(
            torch.tensor([[11, 5, 6]]), num_passes=4, generator=torch.Generator().manual_seed(3), **options, **GUIDED
        )
        for options in ({"pass_candidates": candidates}, {"image_top_k": 30, "image_top_p": 0.9})
    ]
    assert torch.equal(*(output.image_codes for output in drawn))


def test_an_opened_image_need_not_end_with_its_own_start(random_model):
    """What lacks of the start ids is added, and a part of them opens nothing."""
    given = dict(GUIDED, do_sample=False)
    outputs = [random_model.generate(torch.tensor([ids]), **given) for ids in ([11, 6], [11, 6, 5, 6])]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_mode": "text"}, "draws single images of texts. It never writes text"),
        ({"generation_mode": "interleaved"}, "never writes text"),
        ({"thinking": True}, "never writes text"),
        ({"num_frames": 2}, "never draws several images in sequence"),
        ({"height": 224, "width": 224}, "draws images of 112 x 112 pixels in 4 scales and no others"),
        ({"num_scales": 3}, "in 4 scales and no others, but was asked for .* num_scales 3"),
        ({"num_passes": 0}, "`num_passes` must be a whole number of at least 1"),
        ({"pass_candidates": [[[1, 1.0], [1, 1.0]]]}, "`pass_candidates` has for 1, 2, ... passes"),
    ],
)
def test_what_it_can_not_do_is_refused(random_model, settings, message):
    with pytest.raises(ValueError, match=message):
        random_model.generate(torch.tensor([[11, 5, 6]]), **settings)


def test_prompts_that_it_can_not_read(random_model):
    with pytest.raises(ValueError, match="A prompt has 200 tokens, but the model reads 128 and those that open"):
        random_model.generate(torch.full((1, 200), 11))
    codes = list(range(40, 90)) + list(range(40, 60))
    with pytest.raises(ValueError, match="It never reads images"):
        random_model.generate(torch.tensor([[5, 6, *codes, 9]]), image_grid_shw=torch.tensor([[4, 16, 16]]))
    with pytest.raises(
        ValueError, match=r"images have the grid \(4, 16, 16\) in `image_grid_shw`, but got \(3, 16, 16\)"
    ):
        random_model(torch.tensor([[5, 6, *codes]]), image_grid_shw=torch.tensor([[3, 16, 16]]))


def test_passes_need_accumulated_features(tiny_random_checkpoint):
    model = NextFlowForCausalLM.from_pretrained(tiny_random_checkpoint)
    with pytest.raises(
        ValueError, match="`num_passes=2` feeds a scale its own codes, which this model has no input for"
    ):
        model.generate(torch.tensor([[5]]), generation_mode="image", num_passes=2)


def test_what_is_kept_stays_in_every_pass(random_model):
    schedule = random_model.config.schedule()
    source = torch.randint(50, (1, schedule.num_tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 112, 112)
    mask[:, :, :56] = 1
    kept = dict(keep_codes=source, keep_mask=mask, keep_repair=False)
    output = random_model.generate(torch.tensor([[11, 5, 6]]), **kept, **GUIDED, do_sample=False, num_passes=2)
    places = kept_places(mask, schedule)
    assert torch.equal(output.image_codes[places], source[places])
    assert (output.image_codes[~places] != source[~places]).any()
