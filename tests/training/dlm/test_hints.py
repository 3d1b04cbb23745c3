"""Hints: every digit is told its parts, only where they can be seen, and attention to them is what is asked for."""

import torch

from dlm.mini import KINDS
from dlm.mini.words import DIGITS
from training.dlm.feed import STAGES, Feed
from training.dlm.hints import CHANGE, MARK, SIGN, TOTAL, Watch, hints_of
from training.dlm.shape import fresh_model
from training.dlm.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
DIGIT = torch.zeros(len(TOKENIZER), dtype=torch.bool)
DIGIT[TOKENIZER.convert_tokens_to_ids(list(DIGITS))] = True


def worked(text: str, answer: str):
    """A batch of one row."""
    batch = Feed(TOKENIZER, 1100, 7).batch(0, STAGES[0])
    prompt, slots = (TOKENIZER(part, return_tensors="pt")["input_ids"] for part in (text, answer))
    ids = torch.cat([prompt, slots, torch.tensor([[TOKENIZER.eos_token_id]])], 1)
    return type(batch)(ids, torch.ones_like(ids, dtype=torch.bool), prompt.shape[1], slots.shape[1] + 1)


def told(batch, hidden):
    """{(slot, head): (source token, its column from the answer's start)}."""
    tokens = TOKENIZER.convert_ids_to_tokens(batch.ids[0])
    return {
        (slot - batch.prompt, head): (tokens[source], source - batch.prompt)
        for _, head, slot, source in hints_of(batch, hidden, DIGIT).tolist()
    }


def test_a_sum_with_a_carry() -> None:
    batch = worked("tom has 37 apples. he buys 5. how many now?", "=7,3 +50 =2'4 #### 42")
    hidden = torch.ones(1, batch.answer, dtype=torch.bool)
    hidden[0, :8] = False
    found = told(batch, hidden)
    # =7,3 +50 =2'4: slots 0..3, 4..6, 7..10; then #### 42 in 11..13
    assert found[8, TOTAL] == ("7", 1) and found[8, CHANGE] == ("5", 5) and found[8, SIGN] == ("+", 4)
    assert found[10, TOTAL] == ("3", 3) and found[10, CHANGE] == ("0", 6)
    assert (10, MARK) not in found  # the mark is hidden itself
    assert not any(slot < 8 for slot, _ in found)
    hidden[0, 9:11] = False
    assert told(batch, hidden)[12, TOTAL] == ("4", 10)
    hidden[0, 9:] = True
    hidden[0, 9] = False
    assert told(batch, hidden)[10, MARK] == ("'", 9)


def test_numbers_of_the_prompt_and_a_number_of_one_digit() -> None:
    batch = worked("tom has 37 apples. he buys 5. how many now?", "=7,3 +50 =2'4 #### 42")
    found = told(batch, torch.ones(1, batch.answer, dtype=torch.bool))
    assert found[1, TOTAL][0] == "7" and found[3, TOTAL][0] == "3"
    assert found[5, CHANGE] == found[6, CHANGE] and found[5, CHANGE][0] == "5"


def test_the_loss_is_the_attention_of_that_layer() -> None:
    for kind in KINDS:
        torch.manual_seed(0)
        model = fresh_model(kind, TOKENIZER)
        shift = 0 if kind == "llada" else 1
        layers = model.model.layers if kind == "guider" else model.layers
        watch = Watch(layers[-1], shift, causal=kind == "guider")
        batch = worked("tom has 37 apples. he buys 25. how many now?", "=7,3 +52 =2'6 #### 62")
        hints = hints_of(batch, torch.ones(1, batch.answer, dtype=torch.bool), DIGIT)
        model.set_attn_implementation("eager")
        seen = []
        layers[-1].register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        model(input_ids=batch.ids, position_ids=batch.position_ids)
        loss = watch.loss(hints, batch.visible)
        assert loss.requires_grad and 0 < loss.item() < 20
        if kind == "guider":
            model.config.output_attentions = True
            weights = model(input_ids=batch.ids, output_attentions=True).attentions[-1]
            row, head, slot, source = hints.unbind(1)
            torch.testing.assert_close(loss, -weights[row, head, slot - shift, source].log().mean())
