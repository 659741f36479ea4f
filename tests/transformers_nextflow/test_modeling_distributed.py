"""Ranks whose batches have images, text, or nothing to learn: none waits, and together they are one."""

import pytest
import torch
import torch.distributed as dist
from test_modeling_nextflow import BOI, SCHEDULE, build, grids, loss_batch, random_codes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from forks import call_fresh, fork_ranks

TEXT_IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
IMAGE_IDS = torch.tensor([[5, BOI, *random_codes(SCHEDULE), 9, 10]])


def batches() -> dict[str, dict[str, torch.Tensor]]:
    text = {"input_ids": TEXT_IDS, "labels": TEXT_IDS}
    return {
        "images": loss_batch(),
        "text": text,
        "packed text": {**text, "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
        "nothing to learn": {**text, "labels": torch.full_like(TEXT_IDS, -100)},
        "an image to look at": {
            "input_ids": IMAGE_IDS,
            "image_grid_shw": grids(SCHEDULE),
            "labels": IMAGE_IDS.where(IMAGE_IDS < 11, -100),
        },
        "codes alone": {"input_ids": IMAGE_IDS[:, 1:2], "labels": IMAGE_IDS[:, 1:2]},
    }


def train_on_a_rank() -> None:
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
    for name, batch in batches().items():
        for wrapper in ("ddp", "fsdp"):
            pair = (batches()["images"], batch)
            total = sum(int((one["labels"][:, 1:] != -100).sum()) for one in pair)
            whole, model = build().train(), build().train()
            expected = sum(whole(**one, num_items_in_batch=total, use_cache=False).loss for one in pair)
            expected.backward()
            if wrapper == "ddp":
                network = torch.nn.parallel.DistributedDataParallel(model)
            else:
                model.activation_checkpointing_enable()
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh)
                network = fully_shard(model, mesh=mesh)
            loss = 2 * network(**pair[rank], num_items_in_batch=total, use_cache=False).loss
            loss.backward()
            dist.all_reduce(loss)
            gradients = [p.grad.full_tensor() if wrapper == "fsdp" else p.grad for p in model.parameters()]
            assert torch.isclose(loss / 2, expected, rtol=1e-5)
            for ours, (parameter, theirs) in zip(gradients, whole.named_parameters(), strict=True):
                torch.testing.assert_close(
                    ours, theirs.grad, atol=1e-5, rtol=1e-4, msg=f"{name}, {wrapper}: {parameter}"
                )


def on_two_ranks(folder: str) -> None:
    fork_ranks(train_on_a_rank, folder)


@pytest.mark.slow
def test_ranks_without_images_are_waited_for_by_none(tmp_path):
    call_fresh(on_two_ranks, str(tmp_path))


@pytest.mark.parametrize("name", batches())
@pytest.mark.parametrize("peft", [False, True])
def test_every_batch_touches_every_weight(name, peft):
    """With gradients of zero where nothing is used, and to the bit the same outputs."""
    model = build().train()
    if peft:
        from peft import LoraConfig, get_peft_model

        parts = ["embed_tokens", "connector", "visual_codebook", "scale_embedding", "lm_head"]
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=parts))
    batch = batches()[name]
    outputs = model(**batch, skip_logits=False, use_cache=False)
    outputs.loss.backward()
    for parameter, value in model.named_parameters():
        assert not value.requires_grad or value.grad is not None, parameter
    with torch.no_grad():
        again = model(**batch, skip_logits=False, use_cache=False)
    assert torch.equal(outputs.loss, again.loss) and torch.equal(outputs.logits, again.logits)


def test_embeddings_from_outside_touch_every_weight():
    model = build().train()
    embeds = model.get_input_embeddings()(TEXT_IDS)
    model(inputs_embeds=embeds, labels=TEXT_IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(TEXT_IDS).logits)
