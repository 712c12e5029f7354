"""The parts of the sampler: edits of logits, the draw, logprobs. Each works on a whole batch at once."""
