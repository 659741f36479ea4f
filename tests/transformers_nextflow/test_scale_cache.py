"""The preallocated cache against transformers' dynamic one, and rows in groups against all rows under a mask."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from random_weights import sharpen
from transformers_nextflow import scale_cache
from transformers_nextflow.configuration_nextflow import NextFlowConfig
from transformers_nextflow.modeling_nextflow import NextFlowForCausalLM
from transformers_nextflow.scale_cache import RowGroup, ScaleCache
from transformers_nextflow.scale_schedule import ScaleSchedule

TEXT, CODES, BOI, PAD = 40, 64, 30, 33
SCHEDULE = ScaleSchedule(num_scales=6)
CONFIG = NextFlowConfig(
    vocab_size=TEXT + CODES,
    text_vocab_size=TEXT,
    visual_codebook_size=CODES,
    visual_code_dim=12,
    num_scales=6,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    boi_token_id=BOI,
    eoi_token_id=31,
    image_token_id=32,
    bos_token_id=None,
    eos_token_id=34,
    pad_token_id=PAD,
)
PROMPTS = torch.tensor([[5, 6, 7, 8, 9], [PAD, PAD, 10, 11, 12]])
MASK = (PROMPTS != PAD).long()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = NextFlowForCausalLM(CONFIG)
    sharpen(model)
    return model.eval()


@pytest.fixture
def always_in_groups(monkeypatch):
    monkeypatch.setattr(scale_cache, "_MIN_SLOTS", 0)
    monkeypatch.setattr(scale_cache, "_MAX_SLOTS", 1)


def draw(model, rows=2, **settings):
    """Codes, and the hidden states they were drawn from."""
    seen = []
    hook = model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    settings = {"generator": torch.Generator().manual_seed(0), "return_dict_in_generate": True, **settings}
    out = model.generate(PROMPTS[:rows], attention_mask=MASK[:rows], generation_mode="image", **settings)
    hook.remove()
    return out, seen[1:]


# --- Layers ---


def make_states(rows: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, rows, 2, number, 8)
    return keys, values


def test_any_use_equals_a_dynamic_cache():
    torch.manual_seed(0)
    ours, theirs = ScaleCache(CONFIG, capacity=12), DynamicCache(config=CONFIG)
    steps = [
        lambda cache: [cache.update(*states[layer], layer) for layer in range(2)],
        lambda cache: cache.reorder_cache(torch.tensor([1, 0, 0, 1, 1])),
        lambda cache: [cache.update(*more[layer], layer) for layer in range(2)],
        lambda cache: cache.crop(-3),
        lambda cache: cache.batch_select_indices(torch.tensor([4, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: [cache.update(*beyond[layer], layer) for layer in range(2)],
    ]
    states, more, beyond = ([make_states(rows, n) for _ in range(2)] for rows, n in ((2, 4), (5, 7), (4, 6)))
    for step in steps:
        results = [step(cache) for cache in (ours, theirs)]
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(3, 0) == theirs.get_mask_sizes(3, 0)
        if results[0] is not None:
            for mine, other in zip(*results, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    ours.reset()
    assert ours.get_seq_length() == 0
    with pytest.raises(ValueError, match="minus the number of slots"):
        ours.crop(1)


def test_states_are_written_once_and_read_in_place():
    cache = ScaleCache(CONFIG, capacity=10)
    first, _ = cache.update(*make_states(2, 4), 0)
    second, _ = cache.update(*make_states(2, 6), 0)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.untyped_storage().nbytes() == 2 * 2 * 11 * 8 * 4  # with a spare slot


def test_what_nothing_reads_again_is_not_stored():
    cache, plain = ScaleCache(CONFIG, capacity=10, num_unstored=6), DynamicCache(config=CONFIG)
    for number in (4, 6):
        states = [make_states(2, number) for _ in range(2)]
        for layer in range(2):
            for ours, theirs in zip(
                cache.update(*states[layer], layer), plain.update(*states[layer], layer), strict=True
            ):
                assert torch.equal(ours, theirs)
    assert cache.get_seq_length() == 4
    assert cache.layers[0]._buffers[0].shape[2] == 4 + 1  # a spare slot
    assert len(cache.layers[0].workspace.buffers) == 1
    assert cache.layers[0].workspace is cache.layers[1].workspace


@pytest.mark.parametrize(("storage", "tolerance", "bytes_a_number"), [("bfloat16", 2**-8, 2), ("int8", 1 / 127, 1)])
def test_smaller_storage_is_near(storage, tolerance, bytes_a_number):
    cache, plain = ScaleCache(CONFIG, 10, storage), DynamicCache(config=CONFIG)
    for number in (4, 3):
        states = make_states(2, number)
        for ours, theirs in zip(cache.update(*states, 0), plain.update(*states, 0), strict=True):
            assert ours.dtype == torch.float32
            largest = theirs.abs().amax(-1, keepdim=True)
            assert ((ours - theirs).abs() <= tolerance * largest).all()
            assert torch.equal(ours[:, :, -number:], theirs[:, :, -number:]), "a step's own states are exact"
    assert cache.layers[0]._buffers[0].element_size() == bytes_a_number


def test_another_storage_is_refused():
    with pytest.raises(ValueError, match="`storage` must be None"):
        ScaleCache(CONFIG, 10, "int4")


def test_groups_share_padding_and_stay_small():
    cache = ScaleCache(CONFIG, 10)
    assert cache.row_groups(2, 256) is None, "small steps go at once"
    assert cache.row_groups(4, 1024) is None
    assert cache.row_groups(4, 2048) == [RowGroup(0, 2, 0), RowGroup(2, 4, 0)]
    assert cache.row_groups(2, 9000) == [RowGroup(0, 1, 0), RowGroup(1, 2, 0)]
    cache.set_padding(torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 1], [0, 0, 1]]))
    assert cache.row_groups(4, 64) is None, "small steps take a mask"
    assert cache.row_groups(4, 1024) == [RowGroup(0, 2, 0), RowGroup(2, 4, 2)]
    cache.reorder_cache(torch.tensor([0, 2]))
    assert cache.padding == (0, 2)


def test_groups_of_one_size_are_as_large_as_they_can_be():
    """Weights are read once a group: what is left over of a split must not cut all others down to it."""

    def sizes(*groups):
        equal = ScaleCache.equal_groups([RowGroup(*group) for group in groups])
        assert [row for group in equal for row in range(group.start, group.stop)] == list(range(groups[-1][1]))
        return [(group.stop - group.start, group.padding) for group in equal]

    assert sizes((0, 3, 0), (3, 4, 0)) == [(2, 0)] * 2
    assert sizes((0, 7, 0), (7, 8, 0)) == [(4, 0)] * 2
    assert sizes((0, 3, 0), (3, 4, 0), (4, 6, 2)) == [(2, 0), (2, 0), (2, 2)]
    assert sizes((0, 3, 0), (3, 4, 2)) == [(1, 0)] * 3 + [(1, 2)]
    assert sizes((0, 2, 0), (2, 4, 0)) == [(2, 0)] * 2


# --- Images ---


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "num_return_sequences": 2}])
@pytest.mark.parametrize("return_cache", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_images_equal_those_of_a_dynamic_cache(model, request, settings, return_cache, rows):
    plain, states = draw(model, rows, cache_implementation="dynamic", **settings)
    for groups in (False, True):
        if groups:
            request.getfixturevalue("always_in_groups")
        out, ours = draw(model, rows, return_cache=return_cache, **settings)
        for mine, other in zip(ours, states, strict=True):
            assert (mine - other).abs().max() < 1e-4
        assert torch.equal(out.image_codes, plain.image_codes)
        assert (out.cache is not None) == return_cache


def test_groups_need_no_mask_where_prompts_are_padded(model, always_in_groups):
    masks = []
    attend = F.scaled_dot_product_attention

    def spy(query, *args, **kwargs):
        masks.append((query.shape[2], kwargs["attn_mask"]))
        return attend(query, *args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", spy):
        draw(model, guidance_scale=3.0)
    steps = [attn_mask for length, attn_mask in masks if length in SCHEDULE.scale_lengths]
    # Two prompts, and two rows without a prompt: rows of 0, 2 and 5 padded slots, the last two one by one here.
    assert len(steps) == 2 * 4 * (SCHEDULE.num_scales - 1)
    assert all(attn_mask is None for attn_mask in steps)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_images_from_a_smaller_cache(model, storage):
    _, states = draw(model, cache_implementation="dynamic", do_sample=False)
    cache = ScaleCache(CONFIG, 200, storage)
    _, ours = draw(model, cache=cache, do_sample=False)
    # The first scale step reads the prompt alone from the cache, so the codes are not yet others.
    error = (ours[0] - states[0]).abs().max()
    assert 0 < error < 0.05 * states[0].abs().max()


class HostSyncs(TorchDispatchMode):
    """Records the operations that make the host wait for a device, or whose results' sizes depend on data."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[-1].split(".")[0]
        self.calls += 1
        if name in self.WAITING or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_the_recorder_sees_waiting():
    with HostSyncs() as syncs:
        numbers = torch.arange(3)
        assert numbers.max().item() == 2
        assert bool(numbers.any())
        numbers[numbers > 1]
        numbers.nonzero()
    assert syncs.found == ["_local_scalar_dense", "_local_scalar_dense", "index", "nonzero"]


@pytest.mark.parametrize(
    "settings", [{"image_top_k": 2, "image_top_p": 0.9}, {"image_top_p": 0.9}, {}, {"image_top_k": 1}]
)
def test_the_host_never_waits_inside_an_image(model, always_in_groups, settings):
    syncs = HostSyncs()

    def on_scale_end(step, schedule, codes):
        if step == 0:
            syncs.__enter__()
        if step == SCHEDULE.num_scales - 1:
            syncs.__exit__(None, None, None)

    draw(model, guidance_scale=3.0, on_scale_end=on_scale_end, **settings)
    assert not syncs.found
    assert syncs.calls > 100
