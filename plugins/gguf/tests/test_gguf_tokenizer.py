"""The tokenizer built from metadata gives the ids and texts of the tokenizer that the file was made from."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from core.config import EngineConfig
from core.errors import CheckpointError, ConfigError, InvalidParameter
from core_gguf import provide_checkpoint, provide_tokenizer

TEXTS = [
    "",
    "Hello world",
    " a leading and  a double space ",
    "\n\n\t x\r\n",
    "def f(x):\n    return x + 1\n\n\n        pass",
    "naïve café, e\u0301 é, ½²",
    "日本語のテキスト。한국어 हिन्दी عربى",
    "😀 🏳️‍🌈 👩‍👩‍👧",
    "1234567890 3.14 12,345   42",
    "don't I'LL we've",
    "▁▁ Ġ under",
    "\u0000\u0001\ufeff\u200b\u00a0\u3000",
    "<|im_start|>user\nhi<|im_end|>\n<unk><s></s><0x0A>",
    "a" * 300 + " " * 50,
]
CORPUS = [*TEXTS, "the quick brown fox 12 123 1234 jumps over the lazy dogs' tails"] * 3
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt-2": None, "qwen2": QWEN2, "llama-bpe": QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")}
CONTROL, USER_DEFINED, BYTE, UNKNOWN, NORMAL = 3, 4, 6, 2, 1


def _open(path, **changes):
    options = EngineConfig(**changes)
    return provide_tokenizer(provide_checkpoint(str(path), options).spec, options)


@pytest.fixture
def open_tokenizer(write_gguf, tiny):
    """Write a tokenizer's metadata with a model around it, and open it."""

    def write(kind, tokens, types, options=None, arch="llama", **keys):
        keys = {"model": kind, "tokens": tokens, "token_type": types} | keys
        metadata = {key.replace("llama.", f"{arch}."): value for key, value in tiny[0].items()}
        metadata |= {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
        template = metadata.pop("tokenizer.ggml.chat_template", None)
        metadata |= {"tokenizer.chat_template": template} if template else {}
        metadata |= {"gemma3.attention.sliding_window": 4} if arch == "gemma3" else {}
        embedding = {"token_embd.weight": np.zeros((len(tokens), 32), np.float32)}
        return _open(write_gguf(metadata, embedding, arch=arch), **(options or {}))

    return write


# ---------------------------------------------------------------------------------------------- byte-level BPE


def _train(pre):
    """A byte-level tokenizer as its makers would save it."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=PATTERNS[pre] is None)
    split = [pre_tokenizers.Split(Regex(PATTERNS[pre]), behavior="isolated")] if PATTERNS[pre] else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("   ", normalized=False)])
    return tokenizer


def _metadata(trained):
    saved = json.loads(trained.to_str())
    size = trained.get_vocab_size()
    added = {entry["id"]: entry for entry in saved["added_tokens"]}
    types = [NORMAL if i not in added else CONTROL if added[i]["special"] else USER_DEFINED for i in range(size)]
    tokens = [trained.id_to_token(i) for i in range(size)]
    return tokens, types, [" ".join(merge) for merge in saved["model"]["merges"]]


@pytest.mark.parametrize("pre", PATTERNS)
def test_a_byte_level_tokenizer_gives_the_ids_it_was_trained_to_give(open_tokenizer, pre):
    trained = _train(pre)
    tokens, types, merges = _metadata(trained)
    tokenizer = open_tokenizer("gpt2", tokens, types, pre=pre, merges=merges)
    for text in [*CORPUS, "x<think>y</think>   z<|im_end|>"]:
        ids = trained.encode(text).ids
        assert tokenizer.encode(text) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == trained.decode(ids, skip_special_tokens=skip)
    assert [tokenizer.id_to_token(number) for number in range(len(tokens))] == tokens
    assert tokenizer.vocab_size == len(tokens)


@pytest.mark.slow  # transformers takes 20 s to read the file
def test_smollm2_gives_the_ids_that_transformers_reads_from_the_same_file(smollm2_path):
    theirs = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    tokenizer = _open(smollm2_path)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert tokenizer.encode(text) == ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    messages = [{"role": "user", "content": "<b>&'é"}, {"role": "assistant", "content": "x"}]
    for prompt in (True, False):
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.render_chat(messages, add_generation_prompt=prompt) == rendered


SMOLLM2_IDS = {
    "": [],
    "Hello world": [19556, 905],
    " a leading and  a double space ": [253, 2899, 284, 216, 253, 5561, 1898, 216],
    "def f(x):\n    return x + 10\n": [1604, 275, 24, 104, 727, 472, 1003, 1792, 1232, 216, 33, 32, 198],
    "naïve 日本語 😀": [3546, 46494, 17097, 241, 115, 40993, 179, 120, 248, 40303, 218],
    "<|im_start|>user\nhi<|im_end|>\n": [1, 4093, 198, 6004, 2, 198],
}


def test_smollm2_gives_the_ids_that_transformers_gave(smollm2_path):
    tokenizer = _open(smollm2_path)
    for text, ids in SMOLLM2_IDS.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_smollm2_ends_at_its_end_of_turn(smollm2_path):
    tokenizer = _open(smollm2_path)
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.id_to_token(2) == "<|im_end|>"


def test_an_unknown_way_to_cut_words_is_named(open_tokenizer):
    tokens, types, merges = _metadata(_train("gpt-2"))
    with pytest.raises(CheckpointError, match=r"'chameleon' \(tokenizer\.ggml\.pre\)\. Supported: default, gpt-2"):
        open_tokenizer("gpt2", tokens, types, pre="chameleon", merges=merges)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"kind": "bert"}, "tokenizer of kind 'bert'"),
        ({"merges": None}, r"lacks the key 'tokenizer\.ggml\.merges'"),
        ({"merges": ["a b c"]}, "the merge 'a b c' is not two tokens"),
        ({"merges": ["a zz"]}, "do not fit together"),
        ({"types": [1]}, "token_type does not have one number for each of 3"),
        ({"tokens": ["a", "b", "a"]}, "the token 'a' has two ids, 0 and 2"),
        ({"bos_token_id": 3}, "bos_token_id is 3, but there are 3 tokens"),
    ],
)
def test_metadata_that_do_not_fit_together_are_refused(open_tokenizer, changes, problem):
    given_ = {"kind": "gpt2", "tokens": ["a", "b", "ab"], "types": [1, 1, 1], "merges": ["a b"]} | changes
    with pytest.raises(CheckpointError, match=problem):
        open_tokenizer(**given_)


def test_a_special_token_outside_the_byte_letters_keeps_its_id(open_tokenizer):
    tokens = ["a", "b", "ab", "<｜end▁of sentence｜>"]
    tokenizer = open_tokenizer("gpt2", tokens, [1, 1, 1, CONTROL], merges=["a b"], eos_token_id=3)
    assert tokenizer.encode("ab<｜end▁of sentence｜>b") == [2, 3, 1]
    assert tokenizer.decode([2, 3], skip_special_tokens=False) == "ab<｜end▁of sentence｜>"
    assert tokenizer.decode([2, 3]) == "ab"


def test_begin_and_end_are_added_only_where_the_file_asks(open_tokenizer):
    fixed = {"tokens": ["a", "b", "ab", "<s>", "</s>"], "types": [1, 1, 1, 3, 3], "merges": ["a b"]}
    fixed |= {"bos_token_id": 3, "eos_token_id": 4}
    plain = open_tokenizer("gpt2", **fixed)
    assert plain.encode("ab") == [2]
    both = open_tokenizer("gpt2", **fixed, add_bos_token=True, add_eos_token=True)
    assert both.encode("ab") == [3, 2, 4]
    assert both.encode("ab", add_special_tokens=False) == [2]
    assert both.bos_token_id == 3
    llama3 = open_tokenizer("gpt2", **fixed, pre="llama-bpe")  # llama.cpp's default for this family
    assert llama3.encode("ab") == [3, 2]


def test_end_of_turn_comes_from_the_metadata_and_from_the_chat_template(open_tokenizer):
    tokens = ["a", "</s>", "<|im_end|>", "<|eot_id|>", "<|end|>", "aa"]
    fixed = {"tokens": tokens, "types": [1, 3, 3, 3, 1, 1], "merges": ["a a"]}
    template = "{{ messages }}<|im_end|><|end|>"  # <|end|> is not a special token of this vocabulary
    named = open_tokenizer("gpt2", **fixed, eos_token_id=1, eot_token_id=3, chat_template=template)
    assert named.eos_token_ids == (1, 3, 2)
    assert open_tokenizer("gpt2", **fixed, eos_token_id=1).eos_token_ids == (1,)


def test_end_of_turn_is_in_the_generation_config_too(write_gguf, tiny, options):
    path = write_gguf(tiny[0] | {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.eot_token_id": 3}, tiny[1])
    spec = provide_checkpoint(str(path), options).spec
    assert spec.generation_config["eos_token_id"] == [1, 3]
    assert spec.eos_token_ids == (1, 3)


def test_more_tokens_than_embeddings_are_refused(write_gguf, tiny):
    tokens = ["a", "aa", *[f"t{number}" for number in range(39)]]
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a a"]}
    with pytest.raises(CheckpointError, match="41 tokens, but embeddings for 40"):
        _open(write_gguf(tiny[0] | keys, tiny[1]))


# ---------------------------------------------------------------------------------------------- sentencepiece

_WORDS = ["▁a", "▁b", "ab", "▁ab", "ba", "abb", "▁abba", "bb", "▁▁", "é", "aé"]
_LETTERS = ["▁", "a", "b"]
PIECES = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *_WORDS, *_LETTERS]
TYPES = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(_WORDS) + len(_LETTERS))]
SCORES = [0.0] * 259 + [-float(rank) for rank in range(len(_WORDS) + len(_LETTERS))]
LLAMA = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


def _sentencepiece_ids(text):
    """The algorithm itself: merge the adjacent pair whose piece has the best score, the leftmost of equals."""
    vocab = {piece: number for number, piece in enumerate(PIECES)}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(left + right, at) for at, (left, right) in enumerate(pairwise(symbols))]
        known = [(-SCORES[vocab[piece]], at, piece) for piece, at in pairs if piece in vocab]
        if not known:
            break
        _, at, piece = min(known)
        symbols[at : at + 2] = [piece]
    return [number for symbol in symbols for number in _piece_ids(vocab, symbol)]


def _piece_ids(vocab, symbol):
    return [vocab[symbol]] if symbol in vocab else [3 + byte for byte in symbol.encode()]


@pytest.fixture
def llama(open_tokenizer):
    scores = [float(score) for score in SCORES]
    return open_tokenizer("llama", PIECES, TYPES, scores=scores, **LLAMA)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(alphabet="ab é日", max_size=30).filter(lambda text: not text.startswith(" ")))
def test_pieces_merge_by_score_and_the_rest_becomes_bytes(llama, text):
    ids = _sentencepiece_ids(text)
    assert llama.encode(text, add_special_tokens=False) == ids
    assert llama.encode(text) == [1, *ids]  # a sentencepiece file that does not say so begins with bos
    assert llama.decode(ids) == text


def test_special_pieces_in_a_text_are_one_id_each(llama):
    assert llama.encode("ab</s>", add_special_tokens=False)[-1] == 2
    assert llama.decode([1, *llama.encode("ab", False), 2]) == "ab"


def test_gemma_s_tokens_of_spaces_match_and_merge_by_id(open_tokenizer):
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "  ", "▁a", "ab", "▁", "a", "b"]
    types = [3, 3, 3, 3, USER_DEFINED, 1, 1, 1, 1, 1]
    scores = [-1000.0] * len(pieces)  # as in the real files: they say nothing of the order
    keys = {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "add_bos_token": True,
        "add_space_prefix": False,
    }
    tokenizer = open_tokenizer("llama", pieces, types, arch="gemma3", scores=scores, **keys)
    assert tokenizer.encode("  ab") == [2, 4, 6]
    assert tokenizer.encode(" ab") == [2, 5, 9]
    assert tokenizer.decode([2, 4, 6]) == "  ab"
    assert tokenizer.id_to_token(4) == "▁▁"


def test_scores_of_another_length_are_refused(open_tokenizer):
    with pytest.raises(CheckpointError, match="scores does not have one number"):
        open_tokenizer("llama", ["a", "b", "ab"], [1, 1, 1], scores=[0.0])


# ---------------------------------------------------------------------------------------------- both


def test_half_a_surrogate_pair_is_refused(llama):
    with pytest.raises(InvalidParameter, match="half a surrogate pair") as caught:
        llama.encode("a\ud800")
    assert caught.value.param == "prompt"


def test_ids_that_cannot_be_are_refused_and_have_no_spelling(llama):
    with pytest.raises(InvalidParameter, match=r"must be in \[0, 273\), got \[-1\]"):
        llama.decode([-1])
    assert llama.id_to_token(-1) is None
    assert llama.id_to_token(len(PIECES)) is None


def test_without_a_template_a_chat_is_refused(llama):
    assert not llama.has_chat_template
    with pytest.raises(InvalidParameter, match="no chat template"):
        llama.render_chat([{"role": "user", "content": "x"}])


def test_a_template_sees_the_special_tokens_and_tools(open_tokenizer):
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ tools | tojson }}"
    tokenizer = open_tokenizer("llama", PIECES, TYPES, scores=SCORES, **LLAMA, chat_template=template)
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat([{"role": "user", "content": "x"}], [{"a": "<b>"}]) == '<s>x</s>[{"a": "<b>"}]'


def test_a_template_file_replaces_the_file_s_own(open_tokenizer, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text("own {{ messages | length }}")
    fixed = {"scores": SCORES, **LLAMA, "chat_template": "theirs"}
    tokenizer = open_tokenizer("llama", PIECES, TYPES, {"chat_template": str(path)}, **fixed)
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "own 1"
    with pytest.raises(ConfigError, match="Cannot read the chat template"):
        open_tokenizer("llama", PIECES, TYPES, {"chat_template": str(path) + "x"}, **fixed)
