// Attention compiled for one instruction set; setup.py gives this file its own compiler flags.
#include "softmax_avx2.h"
#include "attention_tile.h"

namespace core_kernels {
extern const AttentionSet avx2_attention;
const AttentionSet avx2_attention = {W, store_tokens, attend_tile, merge_parts};
}
