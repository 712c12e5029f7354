"""transformers' tokenizer behind the protocol, opened from a folder that the test makes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from core.config import EngineConfig
from core.detokenizer import Detokenizer
from core.errors import CheckpointError, ConfigError, InvalidParameter
from core.sampling_params import SamplingParams
from core.spec import ModelSpec
from core.tokenizer import HFTokenizer, load_hf_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if tools %}[tools]{{ tools | length }}{% endif %}{% if shout %}!{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def bpe():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["Hello world, how are you?", "naïve café"] * 5, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe(), bos_token="<s>", eos_token="</s>", model_max_length=8)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    return path


def spec(path, **generation):
    return ModelSpec(path, "hf", {"model_type": "llama", "eos_token_id": 1}, generation)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_hf_tokenizer(spec(folder), EngineConfig())


# ------------------------------------------------------------------------------------------------- text and ids


def test_text_goes_to_ids_and_back(tokenizer):
    ids = tokenizer.encode("Hello naïve 🌍")
    assert ids[0] == 0 and tokenizer.decode(ids) == "Hello naïve 🌍"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>Hello naïve 🌍"


def test_special_tokens_are_added_only_if_asked_for(tokenizer):
    assert tokenizer.encode("Hello") == [0, *tokenizer.encode("Hello", add_special_tokens=False)]


def test_special_tokens_in_a_rendered_prompt_are_single_ids(tokenizer):
    assert tokenizer.encode("<s>a</s>", add_special_tokens=False)[::2] == [0, 1]


def test_a_text_longer_than_the_tokenizers_own_limit_is_encoded_whole(tokenizer):
    assert tokenizer.decode(tokenizer.encode("Hello " * 50)) == "Hello " * 50


def test_spaces_before_punctuation_are_kept(folder):
    fast = PreTrainedTokenizerFast.from_pretrained(folder, clean_up_tokenization_spaces=True)
    made = HFTokenizer(fast)
    assert made.decode(made.encode("a . b , c")) == "a . b , c"


def test_half_a_character_in_a_prompt_is_refused(tokenizer):
    with pytest.raises(InvalidParameter, match="position 2") as caught:
        tokenizer.encode("ab\ud83d")
    assert caught.value.param == "prompt"


def test_ids_beyond_the_vocabulary_have_no_text_and_negative_ones_are_refused(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.vocab_size, 10**6]) == "a"
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None and tokenizer.id_to_token(-1) is None
    with pytest.raises(InvalidParameter, match="-5"):
        tokenizer.decode([1, -5])


def test_every_id_has_a_spelling(tokenizer):
    assert tokenizer.id_to_token(1) == "</s>"
    assert all(isinstance(tokenizer.id_to_token(token), str) for token in range(tokenizer.vocab_size))


def test_the_vocabulary_reaches_to_the_highest_id_also_where_ids_have_gaps():
    gaps = Tokenizer(models.WordLevel({"a": 0, "b": 40}, unk_token="a"))
    assert HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=gaps)).vocab_size == 41


def test_a_tokenizer_of_bytes_needs_no_vocabulary_file(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    made = load_hf_tokenizer(spec(tmp_path), EngineConfig())
    assert made.decode(made.encode("café")) == "café"


@settings(max_examples=100, deadline=None)
@given(data=st.data(), chunk=st.integers(1, 4))
def test_incremental_decoding_agrees_with_the_full_decode(tokenizer, data, chunk):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    made = Detokenizer(tokenizer, [], SamplingParams())
    parts = [made.append(ids[at : at + chunk], at + chunk >= len(ids)).text for at in range(0, len(ids), chunk)]
    assert "".join(parts) == tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------- end of a sequence


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({}, (1,)), ({"eos_token_id": [5, 6]}, (5, 6, 1)), ({"eos_token_id": 1}, (1,))],
)
def test_the_models_ends_come_first_then_the_tokenizers(folder, generation, expected):
    made = load_hf_tokenizer(spec(folder, **generation), EngineConfig())
    assert made.eos_token_ids == expected and made.bos_token_id == 0


def test_a_tokenizer_without_special_tokens_has_none():
    made = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))))
    assert made.eos_token_ids == () and made.bos_token_id is None and not made.has_chat_template


# ---------------------------------------------------------------------------------------------------- chat


def test_a_conversation_becomes_the_prompt_of_the_template(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}]
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(messages) == "<s>[system]S[user]hi[assistant]"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "<s>[system]S[user]hi"


def test_tools_and_options_reach_the_template(tokenizer):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    found = tokenizer.render_chat([{"role": "user", "content": ""}], tools=tools, shout=True)
    assert found == "<s>[user][tools]1![assistant]"


def test_the_last_message_can_be_continued(tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure"}]
    found = tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert found == "<s>[user]hi[assistant]Sure"


@pytest.mark.parametrize(
    "messages",
    [[{"role": "robot", "content": "x"}], [{"role": "user", "content": 1 / 3}, {}], [], ["hi"], [[{"role": "user"}]]],
    ids=["raise_exception", "no role", "empty", "text", "nested"],
)
def test_messages_that_the_template_refuses_are_refused_by_name(tokenizer, messages):
    with pytest.raises(InvalidParameter) as caught:
        tokenizer.render_chat(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_dict", "conversation"])
def test_a_conversation_cannot_set_what_the_server_sets(tokenizer, name):
    with pytest.raises(InvalidParameter, match=name) as caught:
        tokenizer.render_chat([{"role": "user", "content": "hi"}], **{name: "x"})
    assert caught.value.param == "chat_template_kwargs"


def test_without_a_template_a_conversation_is_refused_with_the_way_on():
    made = HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=bpe()))
    with pytest.raises(InvalidParameter, match="--chat-template"):
        made.render_chat([{"role": "user", "content": "hi"}])


def test_a_template_file_replaces_the_models_own(folder, tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    made = load_hf_tokenizer(spec(folder), EngineConfig(chat_template=str(file)))
    assert made.render_chat([{"role": "user", "content": "é"}]) == "<é>"


def test_a_template_file_that_is_not_there_is_an_error(folder):
    with pytest.raises(ConfigError, match=r"nowhere\.jinja"):
        load_hf_tokenizer(spec(folder), EngineConfig(chat_template="nowhere.jinja"))


# ------------------------------------------------------------------------------------------------- no tokenizer


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_a_folder_without_tokenizer_files_is_an_error_that_says_how_to_go_on(tmp_path, model_type):
    """For some families transformers makes an empty tokenizer instead of failing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=r"--tokenizer, .*--skip-tokenizer-init"):
        load_hf_tokenizer(spec(tmp_path), EngineConfig())


def test_a_gpt2_folder_with_tokenizer_json_alone_is_opened(tmp_path):
    bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    text = "Hello world"
    made = load_hf_tokenizer(spec(tmp_path), EngineConfig())
    assert made.encode(text, False) == bpe().encode(text, add_special_tokens=False).ids


def test_a_path_that_is_no_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        load_hf_tokenizer(spec(tmp_path / "missing"), EngineConfig())


def test_a_broken_tokenizer_file_is_an_error_that_names_the_folder(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_hf_tokenizer(spec(tmp_path), EngineConfig())


def test_the_tokenizer_of_another_folder_is_used_if_named(folder, tmp_path):
    made = load_hf_tokenizer(spec(tmp_path), EngineConfig(tokenizer=str(folder)))
    assert made.decode(made.encode("Hello")) == "Hello"


def test_remote_code_is_not_run_unless_it_is_trusted(folder, tmp_path):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil"}))
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        load_hf_tokenizer(spec(tmp_path), EngineConfig())


@pytest.mark.parametrize("named", ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral", "qwen2", "gemma3_text", "deepseek_v3", "bert"])
def test_a_tokenizer_is_the_one_that_transformers_chooses_by_the_models_own_config(folder, tmp_path, model_type, named):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 300}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    wanted = AutoTokenizer.from_pretrained(tmp_path)
    found = load_hf_tokenizer(spec(tmp_path), EngineConfig())._tokenizer
    assert type(found) is type(wanted)
    for text in ("Hello world, how are you?", " naïve  café\n</s>"):
        assert found.encode(text) == wanted.encode(text)


def test_opening_a_tokenizer_that_is_named_does_not_import_torchs_compiler(folder, tmp_path):
    """It takes over a second and 150 MB, for nothing but the class of the model's config."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    code = f"""
import sys
from pathlib import Path
from core.config import EngineConfig
from core.spec import ModelSpec
from core.tokenizer import load_hf_tokenizer
load_hf_tokenizer(ModelSpec(Path({str(tmp_path)!r}), "hf", {{"model_type": "llama"}}, {{}}), EngineConfig())
print([name for name in ("torch._dynamo", "triton", "sympy") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
