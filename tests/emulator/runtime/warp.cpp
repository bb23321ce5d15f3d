#include "warp.h"

namespace emu {

// A lane that is not there has no value: what is read from it is undefined, here NaN.
void exchange(void* const* operands, unsigned lanes) {
  uint64_t values[32];
  for (unsigned lane = 0; lane < 32; ++lane)
    values[lane] = lanes >> lane & 1 ? static_cast<Shuffle*>(operands[lane])->value : ~uint64_t{0};
  for (unsigned lane = 0; lane < 32; ++lane)
    if (auto* shuffle = static_cast<Shuffle*>(operands[lane])) shuffle->value = values[shuffle->source];
}

void count_votes(void* const* operands, unsigned) {
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const auto* vote = static_cast<Vote*>(operands[lane]);
    ballot |= static_cast<unsigned>(vote != nullptr && vote->predicate) << lane;
  }
  for (unsigned lane = 0; lane < 32; ++lane)
    if (auto* vote = static_cast<Vote*>(operands[lane])) vote->ballot = ballot;
}

}  // namespace emu
