"""A conversation whose past changes answers like one that was told the new dialogue from the start."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from agentkv.eval.tiny import build
from tests.textkv import tiny
from textkv import Conversation, MethodCache
from textkv.kinds import text_model

GREEDY = dict(do_sample=False, max_new_tokens=6)
FAMILIES = ("llama", *tiny.VISION_FAMILIES)
# kivi with a short exact buffer, so that something is packed at these lengths
METHODS = {"full": None, "snapkv": 0.4, "adakv": 0.4, "streaming_llm": 0.4, "kivi(4,group=16,residual=16)": None}
KEEPS_ALL = "full"


def dialogue(family: str, seed: int = 0, text: int = 12, frames: int = 2):
    """Inputs of a dialogue, with images where the family has any."""
    if family == "llama":
        return {"input_ids": tiny.text_ids(3 * text, seed=seed)}
    return tiny.screens(frames, seed=seed, text=text)[0]


def with_ids(inputs: dict, ids: torch.Tensor) -> dict:
    """The same images under other ids."""
    kinds = {"mm_token_type_ids": (ids == tiny.IMAGE).long()} if "mm_token_type_ids" in inputs else {}
    return inputs | {"input_ids": ids} | kinds


def replaced(ids: torch.Tensor, column: int) -> torch.Tensor:
    """Another ordinary id in a column."""
    ids = ids.clone()
    ids[:, column] = ids[:, column] % 99 + 1
    return ids


def more(answer: torch.Tensor, seed: int = 7, tokens: int = 5) -> torch.Tensor:
    return torch.cat([answer, tiny.text_ids(tokens, batch=len(answer), seed=seed)], 1)


def logits(talk: Conversation, inputs: dict, **options):
    """The answer's ids, and the logits of every one of its tokens."""
    out = talk.generate(**inputs, **(GREEDY | options), return_dict_in_generate=True, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1)


def answers_like(talk: Conversation, other: Conversation, inputs: dict, **options):
    ours, expected = logits(talk, inputs, **options), logits(other, inputs, **options)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(ours[0], expected[0])


@contextmanager
def fed(model):
    """Columns of every forward of the decoder."""
    counts = []

    def note(module, args, kwargs):
        given = kwargs.get("inputs_embeds")
        counts.append((kwargs["input_ids"] if given is None else given).shape[1])

    handle = text_model(model).register_forward_pre_hook(note, with_kwargs=True)
    yield counts
    handle.remove()


@pytest.fixture(params=[(f, m) for f in FAMILIES for m in METHODS], ids=lambda x: f"{x[0]}-{x[1]}")
def case(request, model_of):
    """A family, a model, and a maker of conversations with one method."""
    family, method = request.param
    model = model_of(family)
    return family, method, model, lambda: Conversation(model, method, METHODS[method])


def test_a_longer_unrelated_dialogue(case):
    family, _, model, new = case
    talk = new()
    talk.generate(**dialogue(family), **GREEDY)
    other = dialogue(family, seed=5, text=25, frames=3)
    with fed(model) as counts:
        talk.generate(**other, **GREEDY)
    assert talk.last.how == "read again" and talk.last.reused == 0 and counts[0] == other["input_ids"].shape[1]
    assert "column 0 is another" in talk.last.why
    talk = new()
    talk.generate(**dialogue(family), **GREEDY)
    answers_like(talk, new(), other)


def test_an_edited_earlier_turn(case):
    family, method, _, new = case
    first = dialogue(family)
    talk = new()
    answer = talk.generate(**first, **GREEDY)
    edited = with_ids(first, more(replaced(answer, 8)))
    answers_like(talk, new(), edited)
    assert talk.last.how == ("cropped" if method == KEEPS_ALL else "read again"), talk.last
    assert talk.last.reused == (8 if method == KEEPS_ALL else 0)
    assert talk.last.reused + talk.last.read == edited["input_ids"].shape[1] and "column 8 is another" in talk.last.why


def test_reasoning_that_the_template_drops(case):
    """Answers lose their beginning in the next turn: the cache keeps what lies before, where it can."""
    family, method, _, new = case
    first = dialogue(family)
    n = first["input_ids"].shape[1]
    talk, same = new(), new()
    answer = talk.generate(**first, **GREEDY)
    without = with_ids(first, more(torch.cat([answer[:, :n], answer[:, n + 4 :]], 1)))
    ours = logits(talk, without)[1]
    if talk.last.how == "read again":
        assert method in ("streaming_llm", "kivi(4,group=16,residual=16)") and "cannot" in talk.last.why
        torch.testing.assert_close(ours, logits(new(), without)[1], atol=1e-4, rtol=1e-4)
        return
    assert talk.last.how == "cropped" and n <= talk.last.reused < n + 4
    # Once a prompt is compressed, a later turn goes on from what was kept: so does the same conversation uninterrupted.
    same.generate(**first, **(GREEDY | dict(max_new_tokens=talk.last.reused - n + 1)))
    torch.testing.assert_close(ours, logits(same, without)[1], atol=1e-4, rtol=1e-4)
    assert same.last.reused == talk.last.reused
    if method == KEEPS_ALL:
        torch.testing.assert_close(ours, logits(new(), without)[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_another_image_under_the_same_ids(model_of, family, method, which, longer):
    model, first = model_of(family), dialogue(family)
    talk = Conversation(model, method, METHODS[method])
    answer = talk.generate(**first, **GREEDY)
    pixels = first["pixel_values"].clone()
    pixels[which * 24 : which * 24 + 24] = torch.randn(24, pixels.shape[1], generator=torch.Generator().manual_seed(9))
    changed = with_ids(first, more(answer) if longer else first["input_ids"]) | {"pixel_values": pixels}
    answers_like(talk, Conversation(model, method, METHODS[method]), changed)
    start = int((first["input_ids"][0] == tiny.VISION_START).nonzero()[which]) + 1
    assert f"the image at column {start} of row 0 is another" in talk.last.why
    assert talk.last.reused == (start if method == KEEPS_ALL else 0)


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_another_grid_under_the_same_ids_and_pixels(model_of, family):
    model, first = model_of(family), dialogue(family)
    talk = Conversation(model)
    talk.generate(**first, **GREEDY)
    turned = first | {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 6, 4]])}
    answers_like(talk, Conversation(model), turned)
    assert talk.last.how == "cropped" and "image at column" in talk.last.why


def test_a_beginning_of_what_was_read(case):
    family, method, model, new = case
    first = dialogue(family)
    talk = new()
    answer = talk.generate(**first, **GREEDY)
    talk.generate(**with_ids(first, more(answer)), **GREEDY)
    n = first["input_ids"].shape[1]
    with fed(model) as counts:
        ours = logits(talk, first)
    expected = logits(new(), first)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-4, rtol=1e-4)
    assert counts[0] == talk.last.read == (1 if method == KEEPS_ALL else n)
    assert f"the dialogue ends at column {n}, within what was read" in talk.last.why


def test_a_turn_that_goes_on_reads_nothing_again(case):
    family, _, model, new = case
    first = dialogue(family)
    n, talk = first["input_ids"].shape[1], new()
    assert talk.last is None
    answer = talk.generate(**first, **GREEDY)
    assert talk.last.how == "new" and (talk.last.reused, talk.last.read) == (0, n)
    with fed(model) as counts:
        talk.generate(**with_ids(first, more(answer)), **GREEDY)
    # the last token said, which was never fed, the five that the user adds, and one forward per further token
    assert counts == [6, 1, 1, 1, 1, 1]
    assert talk.last.how == "continued" and (talk.last.reused, talk.last.read) == (n + 5, 6)


def test_a_batch_of_another_size(case):
    family, _, _, new = case
    first = dialogue(family)
    talk = new()
    answer = talk.generate(**first, **GREEDY)
    ids = more(answer).repeat(2, 1)
    twice = with_ids(first, ids)
    if "pixel_values" in first:
        twice |= {name: torch.cat([first[name]] * 2) for name in ("pixel_values", "image_grid_thw")}
    answers_like(talk, new(), twice)
    assert talk.last.how == "read again" and talk.last.why == "the batch has 2 rows and had 1"
    answers_like(talk, new(), first)
    assert talk.last.why == "the batch has 1 rows and had 2"


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_new_images_in_every_row_of_a_batch(model_of, family, method):
    """A processor gives images row after row: those of a later turn lie between those of the first."""
    model = model_of(family)
    rows = [[tiny.screens(1, seed=10 * row + turn)[0] for turn in range(2)] for row in range(2)]

    def whole(parts, answer=None):
        ids = torch.cat([p[0]["input_ids"] for p in parts]) if answer is None else answer
        turns = 1 if answer is None else 2
        if answer is not None:
            ids = torch.cat([answer, torch.cat([p[1]["input_ids"] for p in parts])], 1)
        images = {
            name: torch.cat([p[turn][name] for p in parts for turn in range(turns)])
            for name in ("pixel_values", "image_grid_thw")
        }
        return images | {"input_ids": ids, "mm_token_type_ids": (ids == tiny.IMAGE).long()}

    talk, alone = Conversation(model, method, 0.5), [Conversation(model, method, 0.5) for _ in rows]
    answer = talk.generate(**whole(rows), **GREEDY)
    said = [one.generate(**whole([parts]), **GREEDY) for one, parts in zip(alone, rows, strict=True)]
    assert torch.equal(answer, torch.cat(said))
    ours = logits(talk, whole(rows, answer))[1]
    single = [logits(one, whole([p], a))[1] for one, p, a in zip(alone, rows, said, strict=True)]
    torch.testing.assert_close(ours, torch.cat(single), atol=1e-4, rtol=1e-4)
    assert talk.last.how == "continued"


@pytest.mark.parametrize("method", METHODS)
def test_padding_that_moves_the_columns(model_of, method):
    """Two rows of which the shorter one is padded: wider padding is another beginning, the same goes on."""
    model, ids = model_of("llama"), tiny.text_ids(30, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    ids = ids * mask
    talk, fresh = (Conversation(model, method, METHODS[method]) for _ in range(2))
    answer = talk.generate(ids, attention_mask=mask, **GREEDY)
    ids, mask = more(answer), F.pad(mask, (0, 11), value=1)
    wider = {"input_ids": F.pad(ids, (3, 0)), "attention_mask": F.pad(mask, (3, 0))}
    answers_like(talk, fresh, wider)
    assert talk.last.how == "read again"
    answer = talk.generate(**wider, **GREEDY)
    talk.generate(more(answer), attention_mask=F.pad(wider["attention_mask"], (0, 11), value=1), **GREEDY)
    assert talk.last.how == "continued"


def test_padding_between_turns_after_an_answer_was_taken_back(model_of):
    """A row with a shorter turn has fewer queries to vote with: those of the answer taken back are not counted."""
    model, ids = model_of("llama"), tiny.text_ids(30, batch=2)
    talk, same = (Conversation(model, "snapkv", 0.4) for _ in range(2))
    answer = talk.generate(ids, **GREEDY)
    same.generate(ids, do_sample=False, max_new_tokens=1)
    new = torch.cat([replaced(answer[:, 30:31], 0), tiny.text_ids(11, batch=2, seed=2)], 1)
    mask = torch.ones(2, 42, dtype=torch.int64)
    mask[1, 30:34] = 0
    answers_like(talk, same, {"input_ids": torch.cat([ids, new], 1), "attention_mask": mask})
    assert (talk.last.how, talk.last.reused, same.last.how) == ("cropped", 30, "continued")


def test_a_mask_that_shows_more_is_another_beginning(model_of):
    model, ids = model_of("llama"), tiny.text_ids(20)
    talk, mask = Conversation(model), torch.ones_like(ids)
    mask[:, :4] = 0
    talk.generate(ids, attention_mask=mask, **GREEDY)
    answers_like(talk, Conversation(model), {"input_ids": ids})
    assert "column 0 is another" in talk.last.why
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 7\).*give a mask of the whole dialogue"):
        talk.generate(ids, attention_mask=mask[:, :7])


@pytest.mark.parametrize("options", [dict(num_beams=2), dict(num_beams=2, num_return_sequences=2)])
def test_beams_leave_nothing_to_go_on_from(model_of, options):
    model, ids = model_of("llama"), tiny.text_ids(20)
    talk = Conversation(model)
    answer = talk.generate(ids, **GREEDY, **options)
    answers_like(talk, Conversation(model), {"input_ids": more(answer[:1])})
    assert talk.last.how == "read again" and "2 beams or sequences for 1 rows" in talk.last.why


def test_turns_with_drafts(model_of):
    """What was drafted and refused was not read; and transformers feeds drafts after a whole prompt only."""
    model, ids = model_of("llama"), tiny.text_ids(12).repeat(1, 3)
    drafts = GREEDY | dict(prompt_lookup_num_tokens=3)
    talk = Conversation(model)
    answer = talk.generate(ids, **drafts)
    answers_like(talk, Conversation(model), {"input_ids": more(answer)})
    assert talk.last.how == "continued" and talk.last.reused == 41
    expected = Conversation(model).generate(more(answer), **GREEDY)
    assert torch.equal(talk.generate(more(answer), **drafts), expected)
    assert talk.last.how == "read again" and "drafts" in talk.last.why
    answers_like(talk, Conversation(model), {"input_ids": more(replaced(answer, 20))})
    assert talk.last.how == "cropped" and talk.last.reused == 20


def test_a_turn_that_fails_is_read_again(model_of):
    model, ids = model_of("llama"), tiny.text_ids(20)
    talk = Conversation(model, "snapkv", 0.5)
    answer = talk.generate(ids, **GREEDY)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        talk.generate(more(answer), **GREEDY)
    handle.remove()
    answers_like(talk, Conversation(model, "snapkv", 0.5), {"input_ids": more(answer)})
    assert talk.last.how == "read again" and talk.last.why == "the turn before did not finish"


def test_a_cache_that_was_used_elsewhere(model_of):
    model, ids = model_of("llama"), tiny.text_ids(20)
    talk = Conversation(model)
    answer = talk.generate(ids, **GREEDY)
    talk.cache.crop(-10)
    answers_like(talk, Conversation(model), {"input_ids": more(answer)})
    assert talk.last.how == "continued" and talk.last.reused == 15
    with torch.no_grad():
        model(tiny.text_ids(3), past_key_values=talk.cache)
    answers_like(talk, Conversation(model), {"input_ids": more(answer)})
    assert talk.last.how == "read again" and "did not give it" in talk.last.why
    talk.cache.reset()
    answers_like(talk, Conversation(model), {"input_ids": ids})
    assert talk.last.how == "new"


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_no_image_is_cut_in_two(model_of, family):
    model, first = model_of(family), dialogue(family)
    talk = Conversation(model)
    answer = talk.generate(**first, **GREEDY)
    start = int((first["input_ids"][0] == tiny.IMAGE).nonzero()[6])
    talk.cache.crop(start + 2 - talk.cache.tokens_seen)
    answers_like(talk, Conversation(model), with_ids(first, more(answer)))
    assert talk.last.how == "cropped" and talk.last.reused == start


@pytest.mark.parametrize("family", tiny.VISION_FAMILIES)
def test_images_need_all_three_descriptions(model_of, family):
    first = dialogue(family)
    for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids"):
        with pytest.raises(ValueError, match="image_grid_thw"):
            Conversation(model_of(family)).generate(**{k: v for k, v in first.items() if k != name}, **GREEDY)
    fewer = first | {"pixel_values": first["pixel_values"][24:], "image_grid_thw": first["image_grid_thw"][1:]}
    with pytest.raises(ValueError, match="marks 2 images, image_grid_thw has 1 of 24 patches, pixel_values 24 patches"):
        Conversation(model_of(family)).generate(**fewer, **GREEDY)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_an_emptied_cache_is_as_new(model_of, family, method):
    model, first, other = model_of(family), dialogue(family), dialogue(family, seed=4, text=15)
    cache = MethodCache(model, method, METHODS[method])
    model.generate(**first, past_key_values=cache, **GREEDY)
    cache.reset()
    assert cache.tokens_seen == cache.kv_bytes() == cache.rows == 0 and cache.at_rest is None
    out = model.generate(**other, past_key_values=cache, **GREEDY)
    new = MethodCache(model, method, METHODS[method])
    assert torch.equal(out, model.generate(**other, past_key_values=new, **GREEDY))
    assert cache.kv_bytes() == new.kv_bytes()


@pytest.mark.parametrize("family", ["qwen3_next", "jamba", "gemma2", "llama4_text"])
def test_states_and_windows_are_read_again(family):
    """What states have read, and what has left a window, cannot be taken back; no layer has changed then."""
    model, first = build(family, window=8), tiny.text_ids(20) % 96
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    talk = Conversation(model)
    answer = talk.generate(first, **GREEDY)
    with pytest.raises(ValueError, match="states cannot be taken back|window of 8 can take back only the [01] tokens"):
        talk.cache.crop(-2)
    assert {layer.get_seq_length() for layer in talk.cache.layers if hasattr(layer, "seen")} == {25}
    others = [more(answer), first, tiny.text_ids(40, seed=3), tiny.text_ids(9, batch=2, seed=3), first]
    for number, ids in enumerate(others):
        answers_like(talk, Conversation(model), {"input_ids": ids % 96})
        assert talk.last.how == ("read again" if number else "continued")
