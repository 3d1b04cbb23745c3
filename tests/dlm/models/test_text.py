"""Tokenizers as the two families ship them, without remote code: masks, ends, chat templates, plain text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dlm.models import answer_text, chat_ids, load_model, text_ids
from dlm.models.text import load_tokenizer
from tests.dlm.models.checkpoints import published
from tests.dlm.models.test_decoding_spec import SPEC

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LLADA_SPECIALS = ["<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"]
LLADA_CHAT = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def llada_folder(folder: Path, chat: bool = True) -> Path:
    """A fast tokenizer file, the begin and end tokens declared, the mask not; the base model lacks the chat marks."""
    specials = LLADA_SPECIALS + (LLADA_CHAT if chat else [])
    size = len(BYTES) + len(specials)
    mask = len(BYTES) + 2
    published(
        folder, "llada", vocab_size=size, embedding_size=size, mask_token_id=mask, eos_token_id=mask - 1,
        pad_token_id=mask - 1,
    )  # fmt: skip
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    declared = {"bos_token": specials[0], "eos_token": specials[1], "pad_token": specials[1], "add_bos_token": False}
    text = json.dumps(declared | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False})
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def dream_folder(folder: Path) -> Path:
    """Qwen2's two files and a Python class that must not run; the two specials of Dream come after the vocabulary."""
    base = [*BYTES, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    end, mask = len(BYTES), len(base) + 1
    published(
        folder, "Dream", vocab_size=mask + 5, mask_token_id=mask, bos_token_id=end, eos_token_id=end, pad_token_id=end
    )
    (folder / "vocab.json").write_text(json.dumps({byte: i for i, byte in enumerate(BYTES)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {str(end + i): {"content": name, "special": True} for i, name in enumerate(base[len(BYTES) :])}
    config = {
        "tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": added, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "bos_token": "<|beginoftext|>", "add_bos_token": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenization_dream.py").write_text("raise RuntimeError('remote code ran')")
    return folder


def test_llada_gets_its_mask_and_its_ends(tmp_path: Path) -> None:
    model, tokenizer = load_model(llada_folder(tmp_path))
    n = len(BYTES)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mdm_mask|>", n + 2)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (n, n + 1)
    assert model.decoding_spec.eos_ids == (n + 1, n + 5)
    assert tokenizer.decode(tokenizer("Ünï 3+4")["input_ids"]) == "Ünï 3+4"


def test_dream_gets_its_two_specials_after_the_vocabulary(tmp_path: Path) -> None:
    model, tokenizer = load_model(dream_folder(tmp_path))
    n = len(BYTES)
    ids = tokenizer.convert_tokens_to_ids
    assert (ids("<|beginoftext|>"), ids("<|mask|>"), tokenizer.mask_token_id) == (n + 3, n + 4, n + 4)
    assert model.decoding_spec.eos_ids == (n, n + 2) and tokenizer.pad_token_id == n
    assert tokenizer("a<|mask|>b")["input_ids"][1] == n + 4
    assert tokenizer.decode(tokenizer("Ünï 3+4")["input_ids"]) == "Ünï 3+4"


def test_llada_s_chat_template(tmp_path: Path) -> None:
    _, tokenizer = load_model(llada_folder(tmp_path))
    turns = [
        {"role": "user", "content": "  hi "},
        {"role": "assistant", "content": "yes<|eot_id|><|endoftext|><|endoftext|>"},
        {"role": "user", "content": "2+2"},
    ]
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    user, assistant = head.format("user"), head.format("assistant")
    expected = f"<|startoftext|>{user}hi<|eot_id|>{assistant}yes<|eot_id|>{user}2+2<|eot_id|>{assistant}"
    assert tokenizer.decode(chat_ids(tokenizer, turns)) == expected
    assert chat_ids(tokenizer, turns)[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_dream_s_chat_template(tmp_path: Path, system: str | None) -> None:
    _, tokenizer = load_model(dream_folder(tmp_path))
    turns = [{"role": "system", "content": system}] if system else []
    turns += [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes<|im_end|><|endoftext|>"},
        {"role": "user", "content": "2+2"},
    ]
    said = [("system", system or "You are a helpful assistant."), ("user", "hi"), ("assistant", "yes"), ("user", "2+2")]
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in said)
    assert tokenizer.decode(chat_ids(tokenizer, turns)) == expected + "<|im_start|>assistant\n"


def test_a_base_model_has_no_chat(tmp_path: Path) -> None:
    model, tokenizer = load_model(llada_folder(tmp_path, chat=False))
    assert model.decoding_spec.eos_ids == (len(BYTES) + 1,)
    with pytest.raises(ValueError, match="no chat template, so its model is no chat model; give it plain text"):
        chat_ids(tokenizer, [{"role": "user", "content": "hi"}])


def test_the_folder_s_own_template_goes_first(tmp_path: Path) -> None:
    folder = dream_folder(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": own}))
    _, tokenizer = load_model(folder)
    assert tokenizer.decode(chat_ids(tokenizer, [{"role": "user", "content": "hi"}])) == "[hi]"
    with pytest.raises(ValueError, match="messages is empty"):
        chat_ids(tokenizer, [])


def test_plain_text_and_answers(tmp_path: Path) -> None:
    model, tokenizer = load_model(llada_folder(tmp_path))
    ids = text_ids(tokenizer, "a b")
    assert text_ids(tokenizer, "a b", bos=True) == [tokenizer.bos_token_id, *ids] and text_ids(tokenizer, "") == []
    end, mask = model.decoding_spec.eos_ids[1], tokenizer.mask_token_id
    assert answer_text(tokenizer, [*ids, end, *ids], model.decoding_spec.eos_ids) == "a b"
    assert answer_text(tokenizer, [*ids, mask], model.decoding_spec.eos_ids) == "a b"
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="bos=True, but this tokenizer has no begin token"):
        text_ids(tokenizer, "a", bos=True)


def test_a_tokenizer_of_another_model_is_refused_and_none_is_none(tmp_path: Path) -> None:
    folder = llada_folder(tmp_path / "a")
    tokens = len(BYTES) + 6
    with pytest.raises(ValueError, match=f"has {tokens} tokens, the model's mask is 9999: they do not belong together"):
        load_tokenizer(str(folder), "llada", replace(SPEC, mask_id=9999))
    published(tmp_path / "b", "llada")
    assert load_tokenizer(str(tmp_path / "b"), "llada", SPEC) is None
