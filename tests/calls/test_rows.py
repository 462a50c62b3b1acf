"""Rows that are no examples in order: mixed tasks equal each task alone, or are refused by name.

LoRA is the control: a batch of one task, whose layers see the same rows, is what a task alone computes.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import odd_models
from architectures.shrink import tiny_model
from helpers import TASKS, task_config, token_config
from odd_models import IMAGE_TOKEN, VOCAB
from rank_experts import inject_rank_experts, use_task
from rank_experts.layers import adapted_layers


def text(size: int, length: int, name: str = "") -> dict:
    generator = torch.Generator().manual_seed(size * 100 + length)
    ids = torch.randint(3, 50, (size, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name in ("fsmt", "led"):
        inputs["decoder_input_ids"] = torch.randint(3, 50, (size, 9), generator=generator)
    if name in ("longformer", "led"):
        inputs["global_attention_mask"] = torch.zeros_like(ids)
        inputs["global_attention_mask"][:, 0] = 1
    return inputs


def ids_of(size: int) -> torch.Tensor:
    return torch.tensor([2, 0, 1, 2, 1, 0, 0, 2])[:size]


def adapted(make, **options):
    return inject_rank_experts(make(), task_config(**options)).eval()


def row(inputs: dict, i: int) -> dict:
    return {name: value[i : i + 1] for name, value in inputs.items()}


@torch.no_grad()
def assert_mixed_is_each_alone(model, inputs, ids):
    """A mixed batch against the same batch for one task each, and against each row alone."""
    mixed = model(**inputs, task_ids=ids).logits
    differs = False
    for i, task in enumerate(ids.tolist()):
        whole = model(**inputs, task_ids=TASKS[task]).logits
        torch.testing.assert_close(mixed[i], whole[i], rtol=1e-4, atol=1e-5)
        with use_task(model, TASKS[task]):
            alone = model(**row(inputs, i)).logits
        torch.testing.assert_close(mixed[i], alone[0], rtol=1e-4, atol=1e-4)
        differs = differs or (mixed - whole).abs().max() > 1e-3
    assert differs


SEQUENCE_FIRST = [odd_models.xlnet, odd_models.fsmt, odd_models.longformer, odd_models.led]
every_sequence_first = pytest.mark.parametrize("make", SEQUENCE_FIRST)


@every_sequence_first
@pytest.mark.parametrize("length", [8, 7, 5])
def test_sequence_first_models(make, length):
    """Eight is a multiple of the batch: there a guess by divisibility is wrong without an error."""
    assert_mixed_is_each_alone(adapted(make), text(4, length, make.__name__), ids_of(4))


@every_sequence_first
def test_a_length_that_equals_the_batch_is_refused_where_the_sequence_may_come_first(make):
    model = adapted(make)
    inputs = text(8, 8, make.__name__)
    with pytest.raises(ValueError, match=r"an input of shape \(8, 8, \d+\) cannot be tied.*pad to another length"):
        model(**inputs, task_ids=ids_of(8))
    one = model(**inputs, task_ids="mnli").logits
    assert torch.equal(model(**inputs, task_ids=torch.ones(8, dtype=torch.long)).logits, one)


@pytest.mark.parametrize("size", [2, 4, 7])
def test_batch_first_models_at_any_length(size):
    from models import llama

    assert_mixed_is_each_alone(adapted(llama), text(size, 4), ids_of(size))


class Torch(nn.Module):
    """torch's own encoder with the sequence first, behind an embedding with the batch first."""

    def __init__(self, batch_first=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.batch_first = batch_first

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        y = self.encoder(x if self.batch_first else x.transpose(0, 1))
        return y if self.batch_first else y.transpose(0, 1)


def torch_model(batch_first, **options):
    targets = r".*linear[12]"
    return inject_rank_experts(Torch(batch_first), task_config(target_modules=targets, **options)).train()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("size", "length"), [(4, 8), (4, 7), (4, 4)])
def test_torchs_own_encoder(batch_first, size, length):
    model = torch_model(batch_first)
    inputs, ids = text(size, length)["input_ids"], ids_of(size)
    if size == length and not batch_first:
        with pytest.raises(ValueError, match="pad to another length"):
            model(inputs, task_ids=ids)
        return
    mixed = model(inputs, task_ids=ids)
    for i, task in enumerate(ids.tolist()):
        torch.testing.assert_close(mixed[i], model(inputs, task_ids=TASKS[task])[i], rtol=1e-4, atol=1e-5)


def test_a_layer_seen_with_the_sequence_first_is_remembered():
    """A model of one's own, which nothing is known of beforehand."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, 16)
            self.proj = nn.Linear(16, 5)

        def forward(self, input_ids):
            return self.proj(self.embedding(input_ids).transpose(0, 1)).transpose(0, 1)

    model = inject_rank_experts(Own(), task_config(target_modules=["proj"]))
    mixed = model(text(4, 8)["input_ids"], task_ids=ids_of(4))
    for i, task in enumerate(ids_of(4).tolist()):
        torch.testing.assert_close(mixed[i], model(text(4, 8)["input_ids"], task_ids=TASKS[task])[i])
    with pytest.raises(ValueError, match="pad to another length"):
        model(text(4, 4)["input_ids"], task_ids=ids_of(4))


def test_flattened_rows_of_a_layer_that_puts_the_sequence_first_are_refused():
    """Flattened (L, R, d) has as many rows as flattened (R, L, d), in another order."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, 16)
            self.proj = nn.Linear(16, 16)

        def forward(self, input_ids):
            x = self.proj(self.embedding(input_ids).transpose(0, 1))
            return self.proj(x.reshape(-1, 16))

    model = inject_rank_experts(Twice(), task_config(target_modules=["proj"]))
    with pytest.raises(ValueError, match=r"proj: an input of shape \(32, 16\) cannot be tied"):
        model(text(4, 8)["input_ids"], task_ids=ids_of(4))
    model(text(4, 8)["input_ids"], task_ids="rte")


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_contrastive_loss_knows_the_sequence_first(batch_first):
    """Pooled over each row's tokens: the mean of the losses of the rows alone."""
    model = torch_model(batch_first, contrastive_coef=1.0)
    inputs = text(3, 5)["input_ids"]
    alone = [auxiliary(model, inputs[i : i + 1], ids_of(3)[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(auxiliary(model, inputs, ids_of(3)), torch.stack(alone).mean(0))


@pytest.mark.parametrize("make", [odd_models.xlnet, odd_models.longformer, odd_models.led])
def test_padding_is_left_out_where_the_sequence_comes_first(make):
    """Loads of token gates: as many tokens as the mask has, in every layer that sees the text."""
    model = inject_rank_experts(make(), token_config(target_modules=SEEING_TEXT[make.__name__])).train()
    inputs = text(3, 8, make.__name__)
    inputs["attention_mask"][1, 5:] = 0
    model(**inputs).logits.sum().backward()
    loads = [layer.scope.take_load(layer.path, "default") for _, layer in adapted_layers(model)]
    assert [int(load.sum()) for load in loads] == [21 * 4] * len(loads)
    # Which tokens they are, not only how many: those of the padded row do not matter.
    other = dict(inputs, input_ids=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 7))
    model(**other).logits.sum().backward()
    again = [layer.scope.take_load(layer.path, "default") for _, layer in adapted_layers(model)]
    assert all(torch.equal(load, same) for load, same in zip(loads, again, strict=True))


SEEING_TEXT = {
    "xlnet": r".*ff\.layer_1",
    "longformer": r".*self\.(query|key|value)",
    "led": r".*longformer_self_attn\.(query|key|value)",
}


def auxiliary(model, input_ids, ids):
    from rank_experts.calls.call import current_call

    found = []
    original = model.encoder.forward

    def encoder(x):
        y = original(x)
        call = current_call(next(layer for _, layer in adapted_layers(model)).scope)
        found.extend(loss for _, loss in call.losses)
        return y

    model.encoder.forward = encoder
    model(input_ids, task_ids=ids)
    return torch.stack(found)


@pytest.mark.parametrize("number", [2, 3, 4])
def test_fewer_tasks_than_rows_are_refused_where_no_input_says_whose_the_rows_are(number):
    """3 ids for 6 rows may be forgotten ids as well as examples of two rows each."""
    from models import llama

    model = adapted(llama)
    message = rf"{number} task ids for 6 rows.*packing cannot mix tasks"
    with pytest.raises(ValueError, match=message):
        model(**text(6, 5), task_ids=ids_of(number))
    with use_task(model, ids_of(number)), pytest.raises(ValueError, match=message):
        model(**text(6, 5))
    compiled = torch.compile(model, backend="eager")
    with use_task(model, ids_of(number)), pytest.raises(ValueError, match=message):
        compiled(**text(6, 5))


def test_choices_have_their_examples_tasks():
    model = adapted(lambda: tiny_model("bert", "BertForMultipleChoice"))
    ids = text(6, 5)["input_ids"].reshape(2, 3, 5)
    spread = model(input_ids=ids, task_ids=ids_of(2)).logits
    assert torch.equal(spread, model(input_ids=ids, task_ids=ids_of(2).repeat_interleave(3)).logits)
    assert not torch.equal(spread, model(input_ids=ids, task_ids=ids_of(2).flip(0)).logits)
    compiled = torch.compile(model, backend="eager")
    with use_task(model, ids_of(2)):
        torch.testing.assert_close(compiled(input_ids=ids).logits, spread)
    with pytest.raises(ValueError, match=r"3 task ids for 6 rows"):
        model(input_ids=ids, task_ids=ids_of(3))


def test_a_compiled_forward_in_generate_gives_beams_their_examples_tasks():
    from models import llama

    model = adapted(llama)
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=2, use_cache=False, pad_token_id=0)
    found = model.generate(text(3, 5)["input_ids"], task_ids=ids_of(3), **options)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(text(3, 5)["input_ids"], task_ids=ids_of(3), **options), found)


def test_packed_rows_take_one_task_and_refuse_several():
    from models import llama

    model = adapted(llama)
    packed = {"input_ids": text(1, 9)["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])}
    model(**packed, task_ids=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"3 task ids for 1 rows.*packing cannot mix tasks"):
        model(**packed, task_ids=ids_of(3))


def test_virtual_tokens_make_rows_longer():
    from models import llama

    model = adapted(llama)
    inputs, ids = text(4, 4)["input_ids"], ids_of(4)
    embedded = model.get_input_embeddings()(inputs)
    longer = torch.cat([torch.randn(4, 3, 32), embedded], 1)
    mixed = model(inputs_embeds=longer, task_ids=ids).logits
    for i, task in enumerate(ids.tolist()):
        torch.testing.assert_close(mixed[i], model(inputs_embeds=longer, task_ids=TASKS[task]).logits[i])


def test_a_list_of_experts_sees_tokens_of_nobody_known():
    """As many tokens as rows is chance there: never taken for a vector a row."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCAB, 16)
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

        def forward(self, input_ids):
            x = self.embedding(input_ids).reshape(-1, 16)
            y = torch.zeros_like(x)
            for expert, tokens in zip(self.experts, (torch.tensor([5, 1, 3]), torch.tensor([0, 2, 4]))):
                y[tokens] = expert(x[tokens])
            return y

    model = inject_rank_experts(Experts(), task_config(target_modules=r"experts\.\d"))
    model(text(3, 2)["input_ids"], task_ids="rte")
    with pytest.raises(ValueError, match=r"experts\.0: an input of shape \(3, 16\) cannot be tied.*exclude_modules"):
        model(text(3, 2)["input_ids"], task_ids=ids_of(3))


def test_rows_that_belong_to_no_example_are_refused_and_can_be_left_out():
    model = adapted(odd_models.swinv2)
    inputs, ids = {"pixel_values": torch.randn(3, 3, 16, 16)}, ids_of(3)
    with pytest.raises(ValueError, match=r"cpb_mlp|continuous_position_bias_mlp.*cannot be tied.*exclude_modules"):
        model(**inputs, task_ids=ids)
    model(**inputs, task_ids="rte")
    without = adapted(odd_models.swinv2, exclude_modules=r".*continuous_position_bias_mlp.*")
    assert_mixed_is_each_alone(without, inputs, ids)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_windows_lie_side_by_side(size):
    swin = {"pixel_values": torch.randn(size, 3, 16, 16)}
    assert_mixed_is_each_alone(adapted(odd_models.swin), swin, ids_of(size))


def test_a_mixtures_router_that_is_called_beside_its_experts_sees_all_rows():
    assert_mixed_is_each_alone(adapted(lambda: tiny_model("jetmoe", "JetMoeForCausalLM")), text(3, 5), ids_of(3))


def test_layers_outside_of_a_forward_take_one_id_a_row_and_nothing_else():
    from models import llama

    model = adapted(llama)
    layer = next(layer for _, layer in adapted_layers(model))
    x = torch.randn(3, 4, 32)
    with use_task(model, ids_of(3)):
        mixed = layer(x)
        with pytest.raises(ValueError, match="outside of a forward of the model"):
            layer(torch.randn(6, 4, 32))
        with pytest.raises(ValueError, match="outside of a forward of the model"):
            layer(torch.randn(12, 32))
    for i, task in enumerate(ids_of(3).tolist()):
        with use_task(model, TASKS[task]):
            torch.testing.assert_close(mixed[i], layer(x)[i])


# Images


def llava_inputs(images: list[int], length: int = 16) -> tuple[dict, list[int]]:
    """Texts with their numbers of images, four tokens an image, and the text of each image."""
    inputs = text(len(images), length)
    generator = torch.Generator().manual_seed(5)
    for i, number in enumerate(images):
        inputs["input_ids"][i, 1 : 1 + 4 * number] = IMAGE_TOKEN
    inputs["pixel_values"] = torch.randn(sum(images), 3, 8, 8, generator=generator)
    return inputs, [i for i, number in enumerate(images) for _ in range(number)]


@torch.no_grad()
def assert_images_follow_their_texts(model, inputs, ids, row_of):
    mixed = model(**inputs, task_ids=ids).logits
    differs = False
    for i, task in enumerate(ids.tolist()):
        with use_task(model, TASKS[task]):
            alone = model(**row_of(i)).logits[0]
            whole = model(**inputs).logits
        torch.testing.assert_close(mixed[i], alone, rtol=1e-4, atol=1e-5)
        differs = differs or (mixed - whole).abs().max() > 1e-3
    assert differs


@pytest.mark.parametrize("images", [[1, 1, 1], [2, 0, 1], [0, 3, 0], [1, 2, 3], [2, 2, 2]])
def test_llavas_images_follow_their_texts(images):
    """Three images for three texts may be distributed in any way: the image tokens say how."""
    model = adapted(odd_models.llava)
    inputs, owners = llava_inputs(images)

    def row_of(i):
        own = [image for image, owner in enumerate(owners) if owner == i]
        one = row({name: inputs[name] for name in ("input_ids", "attention_mask")}, i)
        return one | ({"pixel_values": inputs["pixel_values"][own]} if own else {})

    assert_images_follow_their_texts(model, inputs, ids_of(3), row_of)


def test_images_whose_texts_are_not_known_are_refused():
    model = adapted(odd_models.llava)
    inputs, _ = llava_inputs([2, 0, 1])
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embedded, "pixel_values": inputs["pixel_values"]}
    with pytest.raises(ValueError, match=r"vision_tower.*The layer sees images: .*tokens are in input_ids"):
        model(**given, task_ids=ids_of(3))


def test_image_tokens_that_do_not_fit_the_images_are_refused():
    model = adapted(odd_models.llava)
    inputs, _ = llava_inputs([2, 0, 1])
    inputs["input_ids"][1, 3] = IMAGE_TOKEN
    with pytest.raises(ValueError, match=r"vision_tower.*the image tokens in input_ids do not match the images"):
        model(**inputs, task_ids=ids_of(3))


def test_images_and_videos_at_once_are_refused():
    model = adapted(odd_models.qwen2_5_vl)
    inputs, _ = qwen_inputs([[(4, 4)], [(2, 4)]])
    inputs["input_ids"][0, 10:12] = 61
    videos = {"pixel_values_videos": torch.randn(8, 48), "video_grid_thw": torch.tensor([[1, 2, 4]])}
    inputs["mm_token_type_ids"][0, 10:12] = 2
    with pytest.raises(ValueError, match=r"visual.*pixel_values and pixel_values_videos at once"):
        model(**inputs, **videos, task_ids=ids_of(2))


QWENS = [odd_models.qwen2_vl, odd_models.qwen2_5_vl, odd_models.qwen3_vl]


def qwen_inputs(grids: list[list[tuple[int, int]]], length: int = 24) -> tuple[dict, list[list[int]]]:
    """Texts with the grids (height, width) of their images in patches; an image token for four patches."""
    inputs = text(len(grids), length)
    generator = torch.Generator().manual_seed(5)
    flat, owners = [], []
    for i, own in enumerate(grids):
        place = 1
        for height, width in own:
            tokens = height * width // 4
            inputs["input_ids"][i, place] = 62
            inputs["input_ids"][i, place + 1 : place + 1 + tokens] = IMAGE_TOKEN
            inputs["input_ids"][i, place + 1 + tokens] = 63
            place += tokens + 2
            owners += [i] * height * width
            flat.append((1, height, width))
    inputs["image_grid_thw"] = torch.tensor(flat)
    inputs["pixel_values"] = torch.randn(len(owners), 3 * 4 * 4, generator=generator)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    return inputs, owners


@pytest.mark.parametrize("make", QWENS)
@pytest.mark.parametrize(
    "grids", [[[(4, 4)], [(2, 4)], [(4, 2)]], [[(2, 4), (4, 4)], [], [(6, 2)]], [[(2, 2)], [(2, 2)], [(2, 2)]]]
)
def test_qwens_patches_follow_their_texts(make, grids):
    model = adapted(make)
    inputs, owners = qwen_inputs(grids)
    image_of = [i for i, own in enumerate(grids) for _ in own]

    def row_of(i):
        texts = {"input_ids", "attention_mask", "mm_token_type_ids"}
        one = {name: value[i : i + 1] for name, value in inputs.items() if name in texts}
        if i in owners:
            one["pixel_values"] = inputs["pixel_values"][torch.tensor(owners) == i]
            one["image_grid_thw"] = inputs["image_grid_thw"][torch.tensor(image_of) == i]
        return one

    assert_images_follow_their_texts(model, inputs, ids_of(3), row_of)


@pytest.mark.parametrize("images", [2, 6])
def test_clip_with_other_numbers_of_texts_and_images_is_refused(images):
    model = adapted(odd_models.clip)
    inputs = text(4, 5) | {"pixel_values": torch.randn(images, 3, 8, 8)}
    with pytest.raises(ValueError, match=rf"vision_model.*4 texts came with {images} of pixel_values"):
        model(**inputs, task_ids=ids_of(4))
    model(**inputs, task_ids="rte")


def test_clip_with_pairs():
    """Five patches of two images are no five texts of length two."""
    model = adapted(odd_models.clip)
    inputs = text(4, 5) | {"pixel_values": torch.randn(4, 3, 8, 8)}
    with torch.no_grad():
        mixed = model(**inputs, task_ids=ids_of(4))
        for i, task in enumerate(ids_of(4).tolist()):
            alone = model(**row(inputs, i), task_ids=TASKS[task])
            torch.testing.assert_close(mixed.image_embeds[i], alone.image_embeds[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mixed.text_embeds[i], alone.text_embeds[0], rtol=1e-4, atol=1e-5)
    few = text(5, 2) | {"pixel_values": torch.randn(2, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"vision_model.*5 texts came with 2 of pixel_values"):
        model(**few, task_ids=ids_of(5))


@pytest.mark.parametrize("make", QWENS)
def test_generating_with_images_and_beams(make):
    model = adapted(make)
    inputs, owners = qwen_inputs([[(4, 4)], [(2, 4), (2, 2)]], length=12)
    options = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0)
    with use_task(model, ids_of(2)):
        together = model.generate(**inputs, **options)
    for i, task in enumerate(ids_of(2).tolist()):
        texts = {name: inputs[name][i : i + 1] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
        texts["pixel_values"] = inputs["pixel_values"][torch.tensor(owners) == i]
        texts["image_grid_thw"] = inputs["image_grid_thw"][[slice(0, 1), slice(1, 3)][i]]
        with use_task(model, TASKS[task]):
            alone = model.generate(**texts, **options)
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [odd_models.longformer, odd_models.led, odd_models.llava])
def test_checkpointing_keeps_the_rows(make, use_reentrant):
    gradients = []
    inputs = llava_inputs([2, 0, 1])[0] if make is odd_models.llava else text(3, 6, make.__name__)
    for checkpointing in (False, True):
        torch.manual_seed(3)
        model = inject_rank_experts(make(), task_config()).double().train()
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        outputs = model(**inputs, task_ids=ids_of(3))
        (outputs.logits.square().mean() + outputs.rank_expert_loss).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() <= gradients[1].keys()
    for name, gradient in gradients[1].items():
        if name not in gradients[0]:  # Of a block whose output nobody uses; reentrant checkpointing makes zeros.
            assert not gradient.any(), name
            continue
        gradient = gradients[0][name]
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-8, atol=1e-10, msg=name)
