"""A tiny Llama with random weights, served by the real command in a process of its own."""

import subprocess
import sys
import threading

import pytest

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello, how are you? I am fine, thank you.",
    "1 2 3 4 5 é 世界",
]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Return the folder of a checkpoint: 2 layers, hidden size 32, byte-level BPE."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    bpe.train_from_iterator(
        CORPUS * 20, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=special)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # so that the most likely token is clear and changes
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


class Server:
    """`core-serve` as users start it."""

    def __init__(self, model):
        command = [sys.executable, "-c", "from core.cli import main; main()", "--model-path", str(model), "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self.reader = threading.Thread(target=self.drain, daemon=True)

    def wait_ready(self):
        while not (line := self.process.stderr.readline()).startswith("Serving"):
            assert line, "".join(self.lines)
            self.lines.append(line)
        self.announcement = line
        self.url = line.split(" at ")[1].strip()
        self.reader.start()

    def drain(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def close(self):
        """End the server, however far it came; return its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            if self.reader.ident is not None:
                self.reader.join()
            self.process.stderr.close()


@pytest.fixture(scope="session")
def served(tiny_llama):
    """Return a running `core-serve`, which must end well."""
    server = Server(tiny_llama)
    try:
        server.wait_ready()
        yield server
    finally:
        code = server.close()
    assert code == 0, "".join(server.lines)


@pytest.fixture(scope="session")
def reference(tiny_llama):
    """Return (tokenizer, function from ids to the greedy continuation) of transformers itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)

    def generate(ids, count):
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
        return out[0, len(ids) :].tolist()

    return AutoTokenizer.from_pretrained(tiny_llama), generate
