// Attention compiled for one instruction set; setup.py gives this file its own compiler flags.
#include "softmax_plain.h"
#include "attention_tile.h"

namespace core_kernels {
extern const AttentionSet plain_attention;
const AttentionSet plain_attention = {W, store_tokens, attend_tile, merge_parts};
}
